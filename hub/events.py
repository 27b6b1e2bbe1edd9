"""Tells who follows this hub that something new is in the log, whichever process wrote it. Knows no route.

Every process looks for itself, a few times a second while somebody follows: that works alike on SQLite, where commands
beside the hub write too, and with many processes on PostgreSQL, and nothing is lost when a connection is.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec

from loractl.adapters.errors import EventsGone, NotAllowed, Overloaded, Unreachable
from loractl.hub.actor import Actor
from loractl.hub.registry.event_log import EventFilter, EventLog, keep_since
from loractl.hub.settings import HubSettings
from loractl.hub.wire import ErrorBody, HubEvent

_log = logging.getLogger("loractl.hub")

_LOOK_EVERY_S = 0.2
_PRUNE_EVERY_S = 3600.0

Reauthenticate = Callable[[], Awaitable[Actor]]


class EventFeed:
    """Wakes followers; `run` it for as long as the hub is open."""

    def __init__(self, log: EventLog, settings: HubSettings) -> None:
        self._log = log
        self._settings = settings
        self._changed = asyncio.Event()
        self._newest = 0
        self._is_stopping = False
        self.num_followers = 0

    async def run(self) -> None:
        """Look for new events until cancelled; take old ones away once an hour."""
        prune_at = time.monotonic()
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                if self.num_followers:
                    self._note(await self._log.newest())
                if time.monotonic() >= prune_at:
                    prune_at = time.monotonic() + _PRUNE_EVERY_S
                    await self._log.prune(before=keep_since(self._settings.event_keep_days))
            except Unreachable as error:
                _log.warning("events: %s", error.message)
            if self._is_stopping:
                self._wake()

    def stop(self) -> None:
        """End every stream soon; safe to call from a signal handler or another thread."""
        self._is_stopping = True

    def _note(self, newest: int) -> None:
        if newest != self._newest:
            self._newest = newest
            self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _wait_beyond(self, number: int, timeout_s: float) -> None:
        if self._newest > number or self._is_stopping:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    async def start(self, *, after: int | None) -> int:
        """Where a new stream begins: after an event, or now. Raises Overloaded when there are too many streams."""
        if self.num_followers >= self._settings.max_event_streams:
            raise Overloaded("too many streams of events are open", retry_after_s=5.0)
        return await self._log.newest() if after is None else after

    async def stream(self, after: int, *, wanted: EventFilter, actor: Reauthenticate) -> AsyncIterator[bytes]:
        """Server-sent events: what was missed, then `ready`, then what comes; `gone` ends a stream that is too late.

        Ends when the token is no longer valid, and when the hub stops.
        """
        self.num_followers += 1
        is_ready = False
        heartbeat_at = time.monotonic() + self._settings.event_heartbeat_s
        try:
            while not self._is_stopping:
                page = await self._log.after(after, actor=await actor(), wanted=wanted)
                for event in page.events:
                    yield _message(event)
                if page.next_after != after:
                    after = page.next_after
                    continue
                if not is_ready:
                    is_ready = True
                    yield f"event: ready\nid: {after}\ndata: {{}}\n\n".encode()
                if time.monotonic() >= heartbeat_at:
                    heartbeat_at = time.monotonic() + self._settings.event_heartbeat_s
                    # No data, so nobody is told; the id moves on over what this follower may not see.
                    yield f":\nid: {after}\n\n".encode()
                await self._wait_beyond(after, heartbeat_at - time.monotonic())
        except EventsGone as error:
            body = msgspec.json.encode(ErrorBody(error=error.message, code=error.code, hint=error.hint))
            yield b"event: gone\ndata: " + body + b"\n\n"
        except (NotAllowed, Unreachable) as error:
            _log.info("events: a stream ends: %s", error.code)
        finally:
            self.num_followers -= 1


def _message(event: HubEvent) -> bytes:
    return f"event: {event.kind}\nid: {event.id}\ndata: ".encode() + msgspec.json.encode(event) + b"\n\n"
