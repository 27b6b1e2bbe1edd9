"""Runs one server until it is told to stop: the listener, the signals, the drain. Knows no command line.

The first SIGTERM or SIGINT drains: readiness off, new requests 503, what runs finishes, then the listener closes. The
second ends at once.
"""

import asyncio
import json
import logging
import socket
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from types import FrameType

import uvicorn

from loractl.adapters.errors import Unreachable
from loractl.server.app import create_app
from loractl.server.connection import ConnectionLimits, bounded_by
from loractl.server.serving import Serving

# The application cuts a slow reader first, where it is one of its streams, and counts it.
_WRITE_GRACE_S = 5.0


class DrainingServer(uvicorn.Server):
    """uvicorn, with our own end: it keeps listening while it drains, so that readiness can be seen to be off."""

    def __init__(self, config: uvicorn.Config, serving: Serving, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._serving = serving
        self._on_ready = on_ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not recorded as captured: uvicorn would raise the signal again at the end, and the exit code would be 143.
        del sig, frame
        if self._serving.is_draining or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._serving.is_draining = True
        self._loop.call_soon_threadsafe(self._start_drain)

    def stop_now(self) -> None:
        self.should_exit = self.force_exit = True

    def _start_drain(self) -> None:
        self._drain = asyncio.ensure_future(self._drain_then_exit())

    async def _drain_then_exit(self) -> None:
        try:
            await self._serving.drain()
        finally:
            self.should_exit = True


def open_socket(host: str, port: int) -> socket.socket:
    """Bind the listener before anything slow, so that a taken port is known at once; port 0 lets the OS choose."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise Unreachable(
            f"cannot listen on {host}:{port}: {error.strerror}", hint="stop what uses the port, or choose --port"
        ) from error
    return listener


def run_server(serving: Serving, listener: socket.socket, *, on_ready: Callable[[], None]) -> None:
    """Serve until drained. Raises what kept the engine from starting."""
    DrainingServer(uvicorn_config(serving), serving, on_ready).run(sockets=[listener])


def uvicorn_config(serving: Serving) -> uvicorn.Config:
    """How this server's application is run, in production as in tests."""
    settings = serving.settings
    limits = ConnectionLimits(
        header_timeout_s=settings.header_timeout_s, write_timeout_s=settings.write_timeout_s + _WRITE_GRACE_S
    )
    return uvicorn.Config(
        create_app(serving),
        http=bounded_by(limits),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        backlog=4096,
        lifespan="on",
    )


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the facts of the call; never a prompt or an output."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_to_stderr(*, level: str = "info") -> None:
    """Send the server's own log to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("loractl", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level.upper() if name == "loractl" else logging.WARNING)
        logger.propagate = False
