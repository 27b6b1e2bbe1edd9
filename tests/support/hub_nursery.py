"""Hubs that start in a tenth of a second: one process imports everything once and forks a hub at each request.

Each hub is a process of its own that runs what `loractl hub serve` runs, so it can be killed at any instruction.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx


@dataclass
class Hatched:
    """One forked process; `end` is how it ended, as `os.waitstatus_to_exitcode` tells it, or None while it runs."""

    pid: int
    url: str = ""
    admin: str = ""
    end: int | None = None


@dataclass
class Nursery:
    """The process that forks; `log` holds what the hubs write."""

    log: Path
    _process: "subprocess.Popen[str]"
    _admin: str = field(default="")

    def serve(self, root: Path, *, failpoint: str | None = None, **settings: Any) -> Hatched:
        """Start a hub and wait until it answers, or until it is dead."""
        hub = self._ask({"do": "serve", "root": str(root), "failpoint": failpoint, "settings": settings})
        deadline = time.monotonic() + 60.0
        while self.is_running(hub):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{hub.url}/healthz", timeout=5.0).status_code == 200:
                    return hub
            if time.monotonic() > deadline:
                raise RuntimeError(f"the hub did not start: {self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.01)
        return hub

    def collect(self, root: Path, *, failpoint: str | None = None, **settings: Any) -> Hatched:
        """Run one gc without any grace, to its end or its death."""
        hatched = self._ask({"do": "collect", "root": str(root), "failpoint": failpoint, "settings": settings})
        while self.is_running(hatched):
            time.sleep(0.005)
        return hatched

    def is_running(self, hatched: Hatched) -> bool:
        if hatched.end is None:
            answer = self._say({"do": "poll", "pid": hatched.pid})
            hatched.end = answer["end"]
        return hatched.end is None

    def kill(self, hatched: Hatched) -> None:
        """End it as a power cut would end a process."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(hatched.pid, signal.SIGKILL)
        while self.is_running(hatched):
            time.sleep(0.002)

    def files(self, path: Path) -> Path:
        """A path as the hubs see it, for one who is outside of their mounts."""
        return Path(f"/proc/{self._process.pid}/root{path}")

    def _ask(self, order: dict[str, Any]) -> Hatched:
        answer = self._say(order)
        self._admin = answer.get("admin") or self._admin
        return Hatched(answer["pid"], answer.get("url", ""), self._admin)

    def _say(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the nursery is gone: {self.log.read_text(errors='replace')[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def nursery(log: Path, *, inside: Sequence[str] = ()) -> Iterator[Nursery]:
    """Run the forking process until the block ends; its hubs end with it. `inside`: a command that runs it."""
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [*inside, sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True
        )
    try:
        yield Nursery(log, process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30.0)
        assert process.stdout is not None
        process.stdout.close()


def _main() -> None:
    import asyncio
    import socket

    # What a hub imports when it first needs it is imported before any fork.
    from loractl.hub import run
    from loractl.hub.settings import HubSettings

    children: set[int] = set()
    ports: dict[str, int] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "poll":
            pid, status = os.waitpid(order["pid"], os.WNOHANG)
            children.discard(pid)
            print(json.dumps({"end": os.waitstatus_to_exitcode(status) if pid else None}), flush=True)
            continue
        root = order["root"]
        is_new = root not in ports
        if is_new:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                ports[root] = probe.getsockname()[1]
        settings = HubSettings(root=Path(root), port=ports[root], **order["settings"])
        # The first token in a child too: this process must stay without threads, or forking it would be unsafe.
        admin = _in_child(lambda chosen=settings: asyncio.run(run.first_token(chosen))) if is_new else ""
        pid = os.fork()
        if pid == 0:
            _child(order, settings)
        children.add(pid)
        print(json.dumps({"pid": pid, "admin": admin, "url": f"http://127.0.0.1:{settings.port}"}), flush=True)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _in_child(work: Any) -> str:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, (work() or "").encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        text = stream.read()
    os.waitpid(pid, 0)
    return text


def _child(order: dict[str, Any], settings: Any) -> None:
    import asyncio
    import traceback

    from loractl.hub import failpoints, run

    # Only the parent speaks to the test.
    os.dup2(2, 1)
    code = 1
    try:
        failpoints.arm(order["failpoint"])
        if order["do"] == "serve":
            run.serve_hub(settings, announce=lambda *_: None)
        else:
            asyncio.run(run.collect_garbage(settings, grace_s=0.0))
        code = 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    _main()
