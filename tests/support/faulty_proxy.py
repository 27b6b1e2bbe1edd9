"""A proxy on loopback between client and hub that cuts, changes, delays or loses an answer when told to.

Knows HTTP, no hub.
"""

import contextlib
import http.client
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_BLOCK = 64 << 10
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "date"}


@dataclass(slots=True)
class Seen:
    """One request that went through."""

    method: str
    path: str
    headers: dict[str, str]
    status: int


@dataclass(slots=True)
class FaultyProxy:
    """What to break next, and what has passed."""

    url: str
    seen: list[Seen] = field(default_factory=list)
    cut: tuple[str, int] | None = None
    """Part of a path and a number of bytes: the next body of a GET for it ends there."""
    flip: str | None = None
    """Part of a path: the next body of a GET for it has one bit changed."""
    delay: tuple[str, float] | None = None
    """Part of a path and seconds: every request for it waits, until this is None again."""
    lose: str | None = None
    """Part of a path: the answer to the next POST for it becomes 502, though the hub has done its work."""
    refuse: tuple[str, int, dict[str, str]] | None = None
    """Part of a path, a status and headers: the next request for it never reaches the hub."""
    outage: str | None = None
    """Until this is None again, every request is answered by 500 (`"500"`), by nothing (`"hang"`), or done and its
    answer cut off in the middle (`"cut"`)."""

    def paths(self, method: str) -> list[str]:
        return [one.path for one in self.seen if one.method == method]


@contextlib.contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    """Listen until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    state = FaultyProxy(f"http://127.0.0.1:{server.server_address[1]}")
    server.state = state  # type: ignore[attr-defined]
    server.upstream = urlsplit(upstream).netloc  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        del format, args

    def _forward(self) -> None:
        state: FaultyProxy = self.server.state  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.close_connection = True
        if state.refuse is not None and state.refuse[0] in self.path:
            _, status, headers = state.refuse
            state.refuse = None
            self._answer(status, list(headers.items()), b"{}")
            return
        if state.outage == "500":
            self._answer(500, [], b"")
            return
        while state.outage == "hang":
            time.sleep(0.02)
        self._wait()
        upstream: str = self.server.upstream  # type: ignore[attr-defined]
        with contextlib.closing(http.client.HTTPConnection(upstream, timeout=120)) as connection:
            try:
                connection.request(self.command, self.path, body=body or None, headers=dict(self.headers.items()))
                answer = connection.getresponse()
                data = answer.read()
            except (OSError, http.client.HTTPException):
                return  # the hub has gone: so does this connection, without an answer
        state.seen.append(Seen(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, answer.status))
        if state.lose is not None and state.lose in self.path and self.command == "POST":
            state.lose = None
            self._answer(502, [], b"{}")
            return
        headers_out = [(k, v) for k, v in answer.getheaders() if k.lower() not in _HOP_BY_HOP]
        if state.outage == "cut":
            with contextlib.suppress(ConnectionError):
                self._head(answer.status, headers_out, len(data) or 1)
                self.wfile.write(data[: len(data) // 2])
            return
        if state.cut is not None and state.cut[0] in self.path and self.command == "GET":
            num_bytes = state.cut[1]
            state.cut = None
            self._head(answer.status, headers_out, len(data))
            self.wfile.write(data[:num_bytes])
            return
        if state.flip is not None and state.flip in self.path and self.command == "GET" and len(data) > 1000:
            state.flip = None
            data = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]
        self._answer(answer.status, headers_out, data)

    def _wait(self) -> None:
        state: FaultyProxy = self.server.state  # type: ignore[attr-defined]
        started = time.monotonic()
        while (delay := state.delay) is not None and delay[0] in self.path and time.monotonic() - started < delay[1]:
            time.sleep(0.02)

    def _head(self, status: int, headers: list[tuple[str, str]], length: int) -> None:
        self.send_response_only(status)
        names = {name.lower() for name, _ in headers}
        for name, value in headers:
            self.send_header(name, value)
        if "content-length" not in names:
            self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self._head(status, headers, len(data))
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):  # a client that had waited long enough
                self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _forward  # noqa: N815
