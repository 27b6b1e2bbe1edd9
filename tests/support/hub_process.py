"""A hub in a process of its own, through the installed command: it can be stopped, killed and started again."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

_URL = re.compile(r"^hub: (http://\S+)", re.MULTILINE)
_ADMIN = re.compile(r"^ +(lch_\S+)$", re.MULTILINE)


class HubProcess:
    """One hub and its folder; `restart` keeps the address."""

    def __init__(self, root: Path, environment: Mapping[str, str] | None = None) -> None:
        self.root = root
        self.environment = dict(environment or {})
        self.log = root.with_name(f"{root.name}.log")
        self.url = ""
        self.admin = ""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, **more: str) -> None:
        """Start and wait for the address; `more` is set in the environment of this start alone."""
        port = self.url.rpartition(":")[2] or "0"
        environment = {
            key: value
            for key, value in os.environ.items()
            # A client under test must not become a part of the hub.
            if key not in {"PYTHONPATH", "HF_ENDPOINT", "HF_TOKEN"}
        }
        begin = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "loractl.cli", "hub", "serve", "--root", str(self.root), "--port", port],
                env=environment | self.environment | more,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        deadline = time.monotonic() + 60.0
        while (found := _URL.search(self.text(begin))) is None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the hub did not start: {self.text(begin)}")
            time.sleep(0.02)
        self.url = found[1]
        if (admin := _ADMIN.search(self.text(begin))) is not None:
            self.admin = admin[1]

    def text(self, begin: int = 0) -> str:
        """What the hub has written, from byte `begin` of its log."""
        return self.log.read_bytes()[begin:].decode(errors="replace")

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Ask it to end, and wait."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20.0)
            except subprocess.TimeoutExpired:
                self.kill()
            self._process = None

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def restart(self, **more: str) -> None:
        """Kill what runs and start again at the same address."""
        self.kill()
        self.start(**more)


@contextlib.contextmanager
def hub_process(root: Path, environment: Mapping[str, str] | None = None) -> Iterator[HubProcess]:
    """Run a hub in its own process until the block ends."""
    hub = HubProcess(root, environment)
    hub.start()
    try:
        yield hub
    finally:
        hub.kill()
