"""From the name in a request to an adapter on the local disk: resolve, fetch once, outlive a hub that is down.

Knows nothing of tokens and engines. A name is looked up per request, so a moved channel takes effect at once;
what a request was given is a digest and a folder, so nothing moves under it.
"""

import asyncio
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from loractl.adapters.errors import (
    AdapterInvalid,
    BaseMismatch,
    LoractlError,
    NotAllowed,
    NotFound,
    Overloaded,
    RepoNotFound,
    Unreachable,
    UsageError,
)
from loractl.adapters.reference import AdapterRef, Digest, parse_reference
from loractl.hub.client_records import ResolvedAdapter
from loractl.server.breaker import Breaker
from loractl.server.canary import Track, is_chosen

_T = TypeVar("_T")

_log = logging.getLogger("loractl.server")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An adapter ready to be used: its name as it was asked for, its identity, its files."""

    name: str
    digest: Digest
    folder: Path
    repo_id: str | None = None
    revision: str | None = None
    from_disk: bool = True
    """False when this very request had to wait for the download."""
    version: str | None = None
    """The hub's immutable tag of it, such as `v3`."""
    track: Track | None = None
    """Which side of its channel's canary this is; None while there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchLimits:
    """How long answers of the hub are believed, and how much it is asked."""

    fresh_s: float = 0.9
    """Younger answers are used as they are; older ones are renewed, in the background until `usable_s`."""
    usable_s: float = 1.8
    told_s: float = 30.0
    """In place of `fresh_s` while the hub tells which names change."""
    stale_wait_s: float = 0.5
    """How long a request waits for a renewal when an old answer is at hand."""
    resolve_timeout_s: float = 0.9
    download_timeout_s: float = 300.0
    negative_ttl_s: float = 10.0
    max_negative: int = 10_000
    max_known: int = 10_000
    max_lookups_per_s: float = 100.0
    """Lookups of names never seen before, all callers together."""


class HubSide(Protocol):
    """The blocking calls that fetch needs; `HubReader` binds them to a client and a cache."""

    def resolve(self, ref: AdapterRef) -> ResolvedAdapter: ...

    def recall(self, ref: AdapterRef) -> ResolvedAdapter | None:
        """What the name last meant, if that adapter is on the disk; asks nobody."""
        ...

    def cached(self, resolved: ResolvedAdapter) -> Path | None:
        """The folder, if it is on the disk, verified; asks nobody."""
        ...

    def fetch(self, resolved: ResolvedAdapter) -> Path:
        """Download the adapter and give its folder."""
        ...


@dataclass(slots=True)
class _Known:
    resolved: ResolvedAdapter
    at: float


class AdapterSource:
    """Finds adapters by name: the folders given at the start, then the hub; one download however many ask."""

    def __init__(
        self,
        *,
        local: Mapping[str, Found],
        hub: HubSide | None,
        base_fingerprint: str,
        limits: FetchLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_hub_call: Callable[[str, str, float], None] = lambda op, code, seconds: None,
    ) -> None:
        self._on_hub_call = on_hub_call
        self.local = dict(local)
        self.breaker = Breaker(clock=clock)
        self._is_told = False
        self._num_forgotten = 0
        self._hub = hub
        self._base_fingerprint = base_fingerprint
        self._limits = limits or FetchLimits()
        self._clock = clock
        self._known: OrderedDict[AdapterRef, _Known] = OrderedDict()
        self._missing: OrderedDict[AdapterRef, tuple[float, LoractlError]] = OrderedDict()
        self._folders: dict[Digest, tuple[Path, object]] = {}
        self._flights: dict[object, asyncio.Task[object]] = {}
        self._lookup_allowance = self._limits.max_lookups_per_s
        self._allowance_at = clock()
        # Resolves must not queue behind downloads.
        self._resolvers = ThreadPoolExecutor(max_workers=8, thread_name_prefix="hub-resolve")
        self._downloaders = ThreadPoolExecutor(max_workers=4, thread_name_prefix="hub-fetch")

    @property
    def hub_is_up(self) -> bool | None:
        """None without a hub."""
        return None if self._hub is None else self.breaker.is_closed

    @property
    def has_hub(self) -> bool:
        return self._hub is not None

    def known_names(self) -> list[tuple[str, ResolvedAdapter]]:
        """The names that have been resolved lately, with what they meant."""
        return [(str(ref), known.resolved) for ref, known in self._known.items()]

    def forget(self, repo_id: str) -> None:
        """Ask the hub again at the next request for this repo; called when the hub says that it changed."""
        self._num_forgotten += 1
        for ref in [ref for ref in self._known if ref.repo_id == repo_id]:
            self._known[ref].at = float("-inf")
        for ref in [ref for ref in self._missing if ref.repo_id == repo_id]:
            del self._missing[ref]

    def forget_all(self) -> None:
        """As `forget`, for every repo."""
        self._num_forgotten += 1
        for known in self._known.values():
            known.at = float("-inf")
        self._missing.clear()

    @property
    def is_told(self) -> bool:
        """Whether the hub tells at once which names change, so that they need not be asked for every second."""
        return self._is_told

    @is_told.setter
    def is_told(self, value: bool) -> None:
        if value and not self._is_told:
            # What was asked before may have changed before anybody listened.
            self.forget_all()
        self._is_told = value

    async def close(self) -> None:
        for task in list(self._flights.values()):
            task.cancel()
        await asyncio.gather(*self._flights.values(), return_exceptions=True)
        self._resolvers.shutdown(wait=False, cancel_futures=True)
        self._downloaders.shutdown(wait=False, cancel_futures=True)

    async def find(self, name: str, *, caller: str | None = None) -> Found:
        """Give the adapter for a name. Raises NotFound (no such), BaseMismatch, Unreachable (hub down, not cached).

        Where the name is a channel with a canary, the `caller` decides who gets it; None never does.
        """
        if name in self.local:
            return self.local[name]
        ref = self._parse(name)
        resolved = await self._resolve(ref)
        canary = resolved.canary
        if canary is None:
            return await self._found(name, resolved, track=None)
        if caller is not None and is_chosen(caller, canary):
            try:
                return await self._found(name, canary.adapter, track="canary")
            except LoractlError as error:
                # Whoever would try the new version must not be worse off than with the old one.
                _log.warning("the canary of %s cannot be had (%s): its callers get the channel's own", ref, error.code)
        return await self._found(name, resolved, track="stable")

    async def _found(self, name: str, resolved: ResolvedAdapter, *, track: Track | None) -> Found:
        if resolved.base_fingerprint is not None and resolved.base_fingerprint != self._base_fingerprint:
            raise BaseMismatch(
                f"adapter {name} belongs to another base than this server's",
                hint=f"it was made for {resolved.base_fingerprint[:19]}, this base is {self._base_fingerprint[:19]}",
                field="model",
            )
        folder, was_on_disk = await self._folder_of(resolved)
        return Found(
            name=name,
            digest=resolved.digest,
            folder=folder,
            repo_id=resolved.repo_id,
            revision=resolved.revision,
            from_disk=was_on_disk,
            version=resolved.version,
            track=track,
        )

    async def _folder_of(self, resolved: ResolvedAdapter) -> tuple[Path, bool]:
        known = self._folders.get(resolved.digest)
        if known is not None:
            folder, state = known
            if state is not None and await asyncio.to_thread(_state_of, folder) == state:
                return folder, True
        return await self._once(
            resolved.digest, lambda: self._download(resolved), wait_s=self._limits.download_timeout_s
        )

    def _parse(self, name: str) -> AdapterRef:
        if self._hub is not None:
            try:
                return parse_reference(name)
            except UsageError as error:
                raise RepoNotFound(f"no model {name[:200]!r} here", hint=error.hint, field="model") from error
        raise RepoNotFound(f"no model {name[:200]!r} here", hint="GET /v1/models lists what is served", field="model")

    async def _resolve(self, ref: AdapterRef) -> ResolvedAdapter:
        known = self._known.get(ref)
        age_s = self._clock() - known.at if known is not None else float("inf")
        if known is not None and age_s <= (self._limits.told_s if self._is_told else self._limits.fresh_s):
            return known.resolved
        self._check_missing(ref)
        if known is not None and age_s <= self._limits.usable_s:
            self._start(ref, lambda: self._ask(ref))
            return known.resolved
        if known is None and ref not in self._flights:
            self._take_lookup()
        try:
            wait_s = self._limits.resolve_timeout_s if known is None else self._limits.stale_wait_s
            return await self._once(ref, lambda: self._ask(ref), wait_s=wait_s)
        except Unreachable:
            if known is None:
                remembered = await asyncio.to_thread(self._hub.recall, ref) if self._hub is not None else None
                if remembered is None:
                    raise
                return remembered
            # The hub is down or slow: what was true a moment ago keeps serving.
            return known.resolved

    def _check_missing(self, ref: AdapterRef) -> None:
        found = self._missing.get(ref)
        if found is None:
            return
        at, error = found
        if self._clock() - at <= self._limits.negative_ttl_s:
            raise type(error)(error.message, hint=error.hint, field=error.field)
        del self._missing[ref]

    def _take_lookup(self) -> None:
        now = self._clock()
        limit = self._limits.max_lookups_per_s
        self._lookup_allowance = min(limit, self._lookup_allowance + (now - self._allowance_at) * limit)
        self._allowance_at = now
        if self._lookup_allowance < 1:
            raise Overloaded("too many lookups of adapters not seen before", retry_after_s=1, field="model")
        self._lookup_allowance -= 1

    async def _ask(self, ref: AdapterRef) -> ResolvedAdapter:
        assert self._hub is not None
        hub = self._hub
        asked_at, num_forgotten = self._clock(), self._num_forgotten
        try:
            resolved = await self._guarded(
                "resolve", self._resolvers, lambda: hub.resolve(ref), timeout_s=self._limits.resolve_timeout_s
            )
        except (NotFound, NotAllowed) as error:
            # Private and absent look alike to those who may not know.
            missing = RepoNotFound if isinstance(error, NotAllowed) else type(error)
            refusal = missing(f"no adapter {ref} in the hub", hint=error.hint, field="model")
            self._known.pop(ref, None)
            if self._num_forgotten == num_forgotten:
                self._remember(self._missing, ref, (self._clock(), refusal), self._limits.max_negative)
            raise refusal from error
        if self._num_forgotten != num_forgotten:
            # The answer may be from before the change that was told meanwhile: good for those who asked, not to keep.
            asked_at = float("-inf")
        self._remember(self._known, ref, _Known(resolved, asked_at), self._limits.max_known)
        return resolved

    async def _download(self, resolved: ResolvedAdapter) -> tuple[Path, bool]:
        assert self._hub is not None
        hub = self._hub
        # What is on the disk needs no hub, so it must not wait for the breaker either.
        folder = await asyncio.get_running_loop().run_in_executor(self._downloaders, hub.cached, resolved)
        was_on_disk = folder is not None
        if folder is None:
            try:
                folder = await self._guarded(
                    "fetch",
                    self._downloaders,
                    lambda: hub.fetch(resolved),
                    timeout_s=self._limits.download_timeout_s,
                )
            except AdapterInvalid as error:
                # The hub took these files, so it is the way here that changed them: not this caller's fault.
                raise _hub_down(error.message, 2.0) from error
        self._folders[resolved.digest] = folder, await asyncio.to_thread(_state_of, folder)
        return folder, was_on_disk

    async def _guarded(self, op: str, threads: ThreadPoolExecutor, call: Callable[[], _T], *, timeout_s: float) -> _T:
        """Run a blocking call to the hub in a thread, through the breaker."""
        wait_s = self.breaker.seconds_to_wait()
        if wait_s > 0:
            raise _hub_down("the hub has not answered lately", wait_s)
        code, started = "ok", time.monotonic()
        try:
            result = await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(threads, call), timeout_s)
        except TimeoutError as error:
            code = "timeout"
            self.breaker.failed()
            raise _hub_down(f"the hub did not answer in {timeout_s:g} s", 2.0) from error
        except Unreachable as error:
            code = "unreachable"
            self.breaker.failed()
            raise _hub_down(error.message, error.retry_after_s or 2.0) from error
        except LoractlError as error:
            code = error.code.lower()
            self.breaker.succeeded()  # it answered, if not as we wished
            raise
        finally:
            self._on_hub_call(op, code, time.monotonic() - started)
        self.breaker.succeeded()
        return result

    async def _once(self, key: object, make: Callable[[], Awaitable[_T]], *, wait_s: float) -> _T:
        """Join the running flight for `key` or start it; a caller that leaves does not end it for the others."""
        task = self._start(key, make)
        try:
            return await asyncio.wait_for(asyncio.shield(task), wait_s)
        except TimeoutError as error:
            raise _hub_down(f"the hub did not answer in {wait_s:g} s", 2.0) from error

    def _start(self, key: object, make: Callable[[], Awaitable[_T]]) -> "asyncio.Task[_T]":
        running = self._flights.get(key)
        if running is not None:
            return running  # type: ignore[return-value]  # one key always has one type of flight

        async def fly() -> _T:
            return await make()

        task = asyncio.create_task(fly())
        self._flights[key] = task
        task.add_done_callback(lambda done: self._landed(key, done))
        return task

    def _landed(self, key: object, task: "asyncio.Task[_T]") -> None:
        self._flights.pop(key, None)
        if not task.cancelled():
            task.exception()  # seen: a background renewal that fails is told by the next foreground one

    @staticmethod
    def _remember(memory: "OrderedDict[AdapterRef, _T]", ref: AdapterRef, value: _T, limit: int) -> None:
        memory[ref] = value
        memory.move_to_end(ref)
        while len(memory) > limit:
            memory.popitem(last=False)


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


def _hub_down(message: str, retry_after_s: float) -> Unreachable:
    return Unreachable(
        message,
        hint="adapters in this server's cache and the base keep serving; try again soon",
        field="model",
        retry_after_s=retry_after_s,
    )
