"""Sends one blob, or a range of it, with exact lengths; stops when the client is gone. No rule."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from litestar.types import Receive, Scope, Send

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes [start, stop) of a file."""

    start: int
    stop: int


def read_range(header: str | None, size_bytes: int) -> ByteRange | None:
    """The range that a client asks for: None for the whole file (also for several ranges, as the standard allows).

    A range outside of the file comes back empty, which is answered by 416.
    """
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        return ByteRange(max(size_bytes - int(last), 0), size_bytes)
    start = int(first)
    stop = min(int(last) + 1, size_bytes) if last else size_bytes
    return ByteRange(start, stop) if start < stop else ByteRange(0, 0)


class FileAnswer:
    """An ASGI answer. `body` yields exactly the bytes that the headers promise, or raises and the connection is cut."""

    def __init__(
        self,
        *,
        status: int,
        headers: dict[str, str],
        body: AsyncIterator[bytes] | None,
        when_done: Callable[[int], Awaitable[None]] | None = None,
    ) -> None:
        self._status = status
        self._headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        self._body = body
        self._when_done = when_done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        await send({"type": "http.response.start", "status": self._status, "headers": self._headers})
        if self._body is None:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        gone = asyncio.ensure_future(_until_gone(receive))
        num_sent = 0
        try:
            async for piece in self._body:
                if gone.done():
                    return
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                num_sent += len(piece)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone
        if self._when_done is not None:
            await self._when_done(num_sent)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def started(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Read the first piece at once, so that a damaged or missing file is an answer and not a broken connection."""
    try:
        first = await anext(body)
    except StopAsyncIteration:
        first = b""

    async def rest() -> AsyncIterator[bytes]:
        yield first
        async for piece in body:
            yield piece

    return rest()
