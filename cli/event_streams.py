"""Reads streamed answers at little cost: what measures must not use up the machine that is measured. Knows no model.

httpx spends three times as much on a chunk as the server that sends it; this is asyncio and uvicorn's C parser alone.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httptools

_DATA = b"data: "


class EventStreams:
    """Posts to one server and hears its server-sent events; connections are used again."""

    def __init__(self, url: str, *, key: str | None) -> None:
        parts = urlsplit(url if "//" in url else f"//{url}", scheme="http")
        self._is_tls = parts.scheme == "https"
        self._host = parts.hostname or "127.0.0.1"
        self._port = parts.port or (443 if self._is_tls else 80)
        self._prefix = parts.path.rstrip("/")
        self._head = f"host: {parts.netloc.rpartition('@')[2]}\r\ncontent-type: application/json\r\n"
        if key is not None:
            self._head += f"authorization: Bearer {key}\r\n"
        self._idle: list[_Connection] = []

    async def post(self, path: str, body: bytes, on_event: Callable[[bytes], None]) -> int:
        """Send `body` and call `on_event(data)` for each event; returns the status at the end of the answer.

        Raises OSError when the connection cannot be had or breaks, ValueError for an answer that is no HTTP.
        """
        connection = self._idle.pop() if self._idle else await self._connect()
        head = f"POST {self._prefix}{path} HTTP/1.1\r\n{self._head}content-length: {len(body)}\r\n\r\n"
        try:
            status = await connection.ask(head.encode() + body, on_event)
        except BaseException:
            connection.close()
            raise
        if connection.can_be_used_again:
            self._idle.append(connection)
        else:
            connection.close()
        return status

    def close(self) -> None:
        for connection in self._idle:
            connection.close()

    async def _connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        context = ssl.create_default_context() if self._is_tls else None
        _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=context)
        return connection


class _Connection(asyncio.Protocol):
    """One connection with one answer at a time; the names of its methods are asyncio's and httptools'."""

    def __init__(self) -> None:
        self.can_be_used_again = False
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._answer: asyncio.Future[int] | None = None
        self._on_event: Callable[[bytes], None] = lambda data: None
        self._begun = b""

    async def ask(self, request: bytes, on_event: Callable[[bytes], None]) -> int:
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._on_event, self._begun = on_event, b""
        self.can_be_used_again = False
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ValueError(f"the server's answer is no HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.can_be_used_again = False
        self._fail(exc or ConnectionResetError("the server closed the connection"))

    def on_body(self, body: bytes) -> None:
        *lines, self._begun = (self._begun + body).split(b"\n")
        for line in lines:
            if line.startswith(_DATA):
                self._on_event(line[len(_DATA) :])

    def on_message_complete(self) -> None:
        self.can_be_used_again = bool(self._parser.should_keep_alive())
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(int(self._parser.get_status_code()))

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
