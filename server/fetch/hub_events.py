"""Listens to the hub's events and tells which names to ask for again. Knows no request.

While the stream lives, a name that was asked for once stays valid until the hub says that it changed; when it breaks,
names are asked for every second again.
"""

import asyncio
import contextlib
import logging

from loractl.adapters.errors import LoractlError
from loractl.hub.event_client import Gone, Lost, Ready, Told, follow_events
from loractl.server.fetch.known_names import KnownNames

_log = logging.getLogger("loractl.server")


class HubEvents:
    """Follows one hub for what its names mean, from `start` to `close`."""

    def __init__(self, names: KnownNames, url: str, *, token: str | None) -> None:
        self._names = names
        self._url = url
        self._token = token
        self._task: asyncio.Task[None] | None = None
        self._last_code: str | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._follow())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _follow(self) -> None:
        async for told in follow_events(self._url, self._token):
            self._take(told)

    def _take(self, told: Told) -> None:
        match told:
            case Ready():
                self._names.is_told = True
                self._last_code = None
            case Gone():
                self._names.forget_all()
            case Lost(error):
                self._names.is_told = False
                self._say(error)
            case event:
                for name in (event.repo_id, event.data.get("from")):
                    if isinstance(name, str):
                        self._names.forget(name)

    def _say(self, error: LoractlError) -> None:
        # Once per break, however often it is tried again.
        if error.code != self._last_code:
            self._last_code = error.code
            _log.warning("the hub tells no events (%s); names are looked up every second meanwhile", error.code)
