"""The adapters of one hub: what their names mean, and their files on this disk, each fetched once."""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

from loractl.adapters.errors import AdapterInvalid
from loractl.adapters.reference import Digest
from loractl.hub.client_records import ResolvedAdapter
from loractl.server.fetch.flights import Flights
from loractl.server.fetch.hub_calls import FetchLimits, HubCalls, HubSide, hub_down, hub_is_silent
from loractl.server.fetch.known_names import KnownNames


class FromHub:
    """From names to folders, with one hub behind and this disk before it."""

    def __init__(
        self,
        hub: HubSide,
        *,
        limits: FetchLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_call: Callable[[str, str, float], None] = lambda op, code, seconds: None,
    ) -> None:
        self._limits = limits or FetchLimits()
        self.calls = HubCalls(hub, limits=self._limits, clock=clock, on_call=on_call)
        self.names = KnownNames(self.calls, limits=self._limits, clock=clock)
        self._folders: dict[Digest, tuple[Path, object]] = {}
        self._downloads = Flights()

    async def close(self) -> None:
        await self.names.close()
        await self._downloads.close()
        self.calls.close()

    async def folder_of(self, resolved: ResolvedAdapter) -> tuple[Path, bool]:
        """Give an adapter's folder and whether it was on the disk already. Raises Unreachable."""
        known = self._folders.get(resolved.digest)
        if known is not None:
            folder, state = known
            if state is not None and await asyncio.to_thread(_state_of, folder) == state:
                return folder, True
        wait_s = self._limits.download_timeout_s
        try:
            return await self._downloads.join(resolved.digest, lambda: self._download(resolved), wait_s=wait_s)
        except TimeoutError as error:
            raise hub_is_silent(wait_s) from error

    async def _download(self, resolved: ResolvedAdapter) -> tuple[Path, bool]:
        folder = await self.calls.cached(resolved)
        was_on_disk = folder is not None
        if folder is None:
            try:
                folder = await self.calls.fetch(resolved)
            except AdapterInvalid as error:
                # The hub took these files, so it is the way here that changed them: not this caller's fault.
                raise hub_down(error.message, 2.0) from error
        self._folders[resolved.digest] = folder, await asyncio.to_thread(_state_of, folder)
        return folder, was_on_disk


def _state_of(folder: Path) -> object:
    """What changes when somebody changes the folder's files; None when they cannot be looked at.

    Cheap enough for each request, where hashing is not; a disk that lies without a trace is found at the next load
    from it, by the cache.
    """
    try:
        with os.scandir(folder) as entries:
            stats = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    except OSError:
        return None
    return sorted((name, at.st_mode, at.st_ino, at.st_size, at.st_mtime_ns) for name, at in stats)
