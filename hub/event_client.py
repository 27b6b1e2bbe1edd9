"""Follows a hub's events as its clients do: one stream, taken up again after a break. Knows no server's insides.

Ready                 everything that was missed has been told; from now on silence means that nothing changed
HubEvent              something changed
Gone                  some of what was missed is no longer kept: nothing known before is certain
Lost                  the stream broke; it is tried again, and until the next Ready nothing is certain
"""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import msgspec

from loractl.adapters.errors import EventsGone, LoractlError, Unsupported
from loractl.hub import client_errors
from loractl.hub.wire import API_PREFIX, HubEvent

_CONNECT_TIMEOUT_S = 3.0
# The hub says every five seconds that it lives.
_SILENCE_S = 15.0
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 2.0
_HOPELESS_WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Ready:
    """All is told up to event `number`."""

    number: int


@dataclass(frozen=True, slots=True)
class Gone:
    """Events are missing for good."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The stream broke, for this reason."""

    error: LoractlError


Told = Ready | HubEvent | Gone | Lost


async def follow_events(endpoint: str, token: str | None, *, after: int | None = None) -> AsyncIterator[Told]:
    """Follow for ever, through breaks of the hub and the network; cancel it to end it."""
    wait_s = _FIRST_WAIT_S
    headers = {"accept": "text/event-stream"} | ({"authorization": f"Bearer {token}"} if token else {})
    timeout = httpx.Timeout(_SILENCE_S, connect=_CONNECT_TIMEOUT_S)
    async with httpx.AsyncClient(base_url=endpoint.rstrip("/"), headers=headers, timeout=timeout) as http:
        while True:
            error: LoractlError
            try:
                async for told in _one_stream(http, endpoint, after):
                    if isinstance(told, int):
                        after = told
                        continue
                    if isinstance(told, Ready):
                        wait_s = _FIRST_WAIT_S
                    yield told
                error = client_errors.unreachable(endpoint)
            except EventsGone:
                after = None
                yield Gone()
                continue
            except httpx.TransportError as broken:
                error = client_errors.unreachable(endpoint, broken)
            except LoractlError as refused:
                error = refused
            yield Lost(error)
            is_hopeless = error.status < 500 and error.status != 429
            # Many servers lose one hub together; they must not come back together.
            await asyncio.sleep((_HOPELESS_WAIT_S if is_hopeless else wait_s) * random.uniform(0.5, 1.0))  # noqa: S311
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


async def _one_stream(http: httpx.AsyncClient, endpoint: str, after: int | None) -> AsyncIterator[Told | int]:
    """One connection's events, and the number to go on from as a bare int. Raises EventsGone and what the hub says."""
    params = {} if after is None else {"after": after}
    async with http.stream("GET", f"{API_PREFIX}/events", params=params) as response:
        if not response.is_success:
            content = await response.aread()
            if not client_errors.is_own_error(content) and response.status_code < 500:
                raise Unsupported(f"the hub at {endpoint} tells no events")
            raise client_errors.error_of_response(response.status_code, response.headers, content, place=endpoint)
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            raise Unsupported(f"the hub at {endpoint} tells no events")
        async for message in _messages(response.aiter_lines()):
            match message.kind:
                case "gone":
                    raise EventsGone("the hub no longer has the events that were missed")
                case "ready":
                    yield Ready(message.number or 0)
                case None:
                    pass
                case _:
                    yield _decode(message.data, endpoint)
            if message.number is not None:
                yield message.number


@dataclass(slots=True)
class _Message:
    kind: str | None = None
    number: int | None = None
    data: str = ""


async def _messages(lines: AsyncIterator[str]) -> AsyncIterator[_Message]:
    """Server-sent events as this hub writes them: one line of data each."""
    message = _Message()
    async for line in lines:
        if not line:
            yield message
            message = _Message()
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            message.kind = value
        elif name == "id" and value.isascii() and value.isdigit():
            message.number = int(value)
        elif name == "data":
            message.data += value


def _decode(data: str, endpoint: str) -> HubEvent:
    try:
        return msgspec.json.decode(data, type=HubEvent)
    except msgspec.DecodeError as error:
        raise Unsupported(
            f"the hub at {endpoint} tells events that this loractl does not understand: {error}"
        ) from error
