"""Carries an answer to its client, whole or as server-sent events, and notices when the client leaves.

Knows tickets and ASGI; refuses to know what an answer looks like (see `replies`).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import TracebackType
from typing import Self, TypeVar

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
        with _WriteLimit(self._write_timeout_s) as limit:
            try:
                async for chunk in self._chunks:
                    # While a chunk waits, later tokens gather in the ticket and go out together.
                    limit.begins()
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    limit.ends()
            except LoractlError as error:
                # The status line has gone: the error is an event, then the stream ends.
                event = server_event(msgspec.json.encode(error_reply(error)))
                limit.begins()
                await send({"type": "http.response.body", "body": event, "more_body": True})
            limit.begins()
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class _WriteLimit:
    """Ends the task that opened it with SlowReader when one of its writes takes too long.

    One timer a stream, looked at when it is due: a timer of its own for every token would cost as much as the token.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._began_at: float | None = None
        self._has_struck = False
        self._timer = self._loop.call_later(limit_s, self._look)

    def begins(self) -> None:
        self._began_at = self._loop.time()

    def ends(self) -> None:
        self._began_at = None

    def _look(self) -> None:
        waited_s = 0.0 if self._began_at is None else self._loop.time() - self._began_at
        if waited_s < self._limit_s:
            self._timer = self._loop.call_later(self._limit_s - waited_s, self._look)
        elif self._task is not None:
            self._has_struck = True
            self._task.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        is_mine = self._has_struck and isinstance(error, asyncio.CancelledError)
        # If somebody else cancels too, it stays a cancellation.
        if is_mine and self._task is not None and self._task.uncancel() == 0:
            raise SlowReader from error
