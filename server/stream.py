"""Carries an answer to its client, whole or as server-sent events, and notices when the client leaves.

Knows tickets and ASGI; refuses to know what an answer looks like (see `replies`).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TypeVar

import msgspec
from litestar.types import Receive, Scope, Send

from loractl.adapters.errors import LoractlError
from loractl.server.openai_errors import error_reply

_T = TypeVar("_T")

DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


class SlowReader(Exception):
    """The client did not take a chunk in time."""


def server_event(body: bytes) -> bytes:
    """One event of an SSE stream."""
    return b"data: " + body + b"\n\n"


async def unless_gone(receive: Receive, work: Awaitable[_T]) -> _T:
    """Run `work` while its client stays; raises ClientGone, and cancels the work, when the client leaves.

    The body must have been read: from then on ASGI delivers nothing but the disconnect.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            if not each.done():
                each.cancel()
                with contextlib.suppress(asyncio.CancelledError, ClientGone, LoractlError):
                    await each


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """An ASGI response that sends chunks as they come, and always calls `on_close`, whatever ends it."""

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        *,
        headers: Mapping[str, str],
        on_close: Callable[[BaseException | None], None],
        write_timeout_s: float,
    ) -> None:
        self._chunks = chunks
        self._headers = headers
        self._on_close = on_close
        self._write_timeout_s = write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        ended_by: BaseException | None = None
        try:
            await unless_gone(receive, self._send_all(send))
        except (ClientGone, SlowReader) as error:
            ended_by = error
        except BaseException as error:
            ended_by = error
            raise
        finally:
            self._on_close(ended_by)

    async def _send_all(self, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in self._headers.items()]
        headers += [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        # Proxies (nginx) buffer streams unless they are told not to.
        headers.append((b"x-accel-buffering", b"no"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for chunk in self._chunks:
                await self._write(send, chunk, more=True)
        except LoractlError as error:
            # The status line has gone: the error is an event, then the stream ends.
            await self._write(send, server_event(msgspec.json.encode(error_reply(error))), more=True)
        await self._write(send, b"", more=False)

    async def _write(self, send: Send, chunk: bytes, *, more: bool) -> None:
        """Send one chunk. While it waits, later tokens gather in the ticket and go out together."""
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await send({"type": "http.response.body", "body": chunk, "more_body": more})
        except TimeoutError as error:
            raise SlowReader from error
