"""One client's connection: bounds on how slowly it may send and read, which uvicorn lacks. Knows no route."""

import asyncio
from dataclasses import dataclass
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_LAST_CHANCE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """How long a client may keep a connection without getting on."""

    header_timeout_s: float = 15.0
    """From the first byte of a request, or from the connection, to the end of the headers."""
    write_timeout_s: float = 35.0
    """How long what was written may wait in the buffer of a client that reads too slowly."""


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's protocol, cut when its client neither sends a request nor takes an answer.

    A body's time is the application's to bound: it can still answer.
    """

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()
    _awaiting_request: asyncio.TimerHandle | None = None
    _awaiting_reader: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._await_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # uvicorn has no cycle before the first request, whatever its types say.
        if not self.cycle or self.cycle.response_complete:
            # Also what still drips of a body that was refused before it was complete.
            self._await_request()
        elif self._awaiting_request is not None:
            self._awaiting_request.cancel()
            self._awaiting_request = None

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._awaiting_request, self._awaiting_reader):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._awaiting_reader is not None:
            self._awaiting_reader.cancel()
            self._awaiting_reader = None

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        # Closing waits for what the client has not read yet.
        self._await_reader()

    def _await_request(self) -> None:
        if self._awaiting_request is None and not self.transport.is_closing():
            self._awaiting_request = self.loop.call_later(self.limits.header_timeout_s, self._last_chance)

    def _last_chance(self) -> None:
        # A loop that was late itself has not read yet what came long ago; once it turns, it reads before it cuts.
        self._awaiting_request = self.loop.call_later(_LAST_CHANCE_S, self.transport.abort)

    def _await_reader(self) -> None:
        if self._awaiting_reader is None:
            self._awaiting_reader = self.loop.call_later(self.limits.write_timeout_s, self.transport.abort)


def bounded_by(limits: ConnectionLimits) -> type[BoundedConnection]:
    """uvicorn makes connections from a class, so limits come as one."""
    return type("BoundedConnection", (BoundedConnection,), {"limits": limits})
