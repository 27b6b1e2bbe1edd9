"""A server in a process of its own, real but for its engine, so that drills can signal, kill and count it.

    python drill_server.py '{"step_s": 0.01, "max_queue": 1000, "settings": {...}, "hub": URL, "cache": DIR}'
    python drill_server.py '{"base": DIR, "adapters": {NAME: DIR}, "num_slots": 3}'     with the real engine

Prints its address, then serves until it is told to end.
"""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loractl.server.serving import Serving

_READY = re.compile(r"^ready: (http://\S+)$", re.MULTILINE)


class DrillServer:
    """One such process, seen from the drill."""

    def __init__(self, options: Mapping[str, Any], log: Path, environment: Mapping[str, str]) -> None:
        self._log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, __file__, json.dumps(dict(options))],
                env={**os.environ, **environment},
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
            )
        deadline = time.monotonic() + 60
        while (found := _READY.search(self.text())) is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise RuntimeError(f"the server did not start: {self.text()}")
            time.sleep(0.02)
        self.url = found[1]
        self.port = int(self.url.rpartition(":")[2])

    def text(self) -> str:
        return self._log.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    @property
    def rss_mib(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize() / (1 << 20)

    @property
    def peak_rss_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    @property
    def num_files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


@contextlib.contextmanager
def drill_server(log: Path, *, environment: Mapping[str, str] | None = None, **options: Any) -> Iterator[DrillServer]:
    """Run a server until the block ends."""
    server = DrillServer(options, log, environment or {})
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


class _Forgetful(list[Any]):
    """A list that keeps nothing."""

    def append(self, value: Any) -> None:
        del value


def main(options: dict[str, Any]) -> None:
    """Be that process."""
    from loractl.server.run import log_to_stderr, open_socket, run_server

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    serving = _with_real_engine(options) if "base" in options else _with_fake_engine(options)
    listener = open_socket("127.0.0.1", 0)
    if "send_buffer" in options:
        # Accepted connections inherit it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, options["send_buffer"])
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    log_to_stderr(level="error")
    run_server(serving, listener, on_ready=lambda: print(f"ready: {url}", flush=True))


def _with_real_engine(options: dict[str, Any]) -> "Serving":
    from loractl.server import assemble
    from loractl.server.engine.settings import EngineSettings

    choices = assemble.Choices(
        base=options["base"],
        adapters={name: Path(folder) for name, folder in options["adapters"].items()},
        quantization="none",
        dtype="float32",
        engine=EngineSettings(num_slots=options["num_slots"], max_rank=8, kv_bytes=8 << 20),
    )
    return assemble.load(assemble.check(choices))


def _with_fake_engine(options: dict[str, Any]) -> "Serving":
    from fakes import FakeEngine
    from loractl.adapters.local_cache import AdapterCache
    from loractl.server.access import Access
    from loractl.server.bridge import Bridge
    from loractl.server.fetch.from_hub import FromHub
    from loractl.server.fetch.hub_reader import HubReader
    from loractl.server.fetch.source import AdapterSource
    from loractl.server.metrics import ServerMetrics
    from loractl.server.prompts import Prompts
    from loractl.server.serving import Serving, ServingSettings
    from tiny_tokenizer import tiny_tokenizer

    tokenizer = tiny_tokenizer()

    def make_engine() -> FakeEngine:
        engine = FakeEngine(tokenizer)
        # What tests look up would look like a leak here.
        engine.submitted, engine.cancelled = _Forgetful(), _Forgetful()
        for name in ("step_s", "max_queue", "max_running"):
            setattr(engine, name, options.get(name, getattr(engine, name)))
        return engine

    fingerprint = "sha256:" + "b" * 64
    hub = None
    if "hub" in options:
        cache = AdapterCache(Path(options["cache"]))
        hub = FromHub(HubReader(options["hub"], token=options.get("token"), cache=cache))
    metrics = ServerMetrics()
    keys = options.get("keys")
    return Serving(
        settings=ServingSettings(base_name="tiny", base_fingerprint=fingerprint, **options.get("settings", {})),
        bridge=Bridge(make_engine, on_step=metrics.saw_step),
        source=AdapterSource(local={}, hub=hub, base_fingerprint=fingerprint),
        prompts=Prompts(tokenizer),
        metrics=metrics,
        access=Access.from_file(Path(keys)) if keys else None,
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
