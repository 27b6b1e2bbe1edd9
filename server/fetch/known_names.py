"""What names mean: the hub's answers, believed for a while, renewed in the background, kept while it is away."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from loractl.adapters.errors import LoractlError, NotAllowed, NotFound, Overloaded, RepoNotFound, Unreachable
from loractl.adapters.reference import AdapterRef
from loractl.hub.client_records import ResolvedAdapter
from loractl.server.fetch.flights import Flights
from loractl.server.fetch.hub_calls import FetchLimits, HubCalls, hub_is_silent

_T = TypeVar("_T")


@dataclass(slots=True)
class _Known:
    resolved: ResolvedAdapter
    at: float


class KnownNames:
    """The names that were asked for, found and missing, both bounded."""

    def __init__(self, hub: HubCalls, *, limits: FetchLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._hub = hub
        self._limits = limits
        self._clock = clock
        self._is_told = False
        self._num_forgotten = 0
        self._known: OrderedDict[AdapterRef, _Known] = OrderedDict()
        self._missing: OrderedDict[AdapterRef, tuple[float, LoractlError]] = OrderedDict()
        self._flights = Flights()
        self._lookup_allowance = limits.max_lookups_per_s
        self._allowance_at = clock()

    @property
    def num_missing(self) -> int:
        """Names that are known to mean nothing."""
        return len(self._missing)

    def known(self) -> list[tuple[str, ResolvedAdapter]]:
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

    async def resolve(self, ref: AdapterRef) -> ResolvedAdapter:
        """Tell what a name means now. Raises NotFound, Overloaded (too many new names), Unreachable (never heard)."""
        known = self._known.get(ref)
        age_s = self._clock() - known.at if known is not None else float("inf")
        if known is not None and age_s <= (self._limits.told_s if self._is_told else self._limits.fresh_s):
            return known.resolved
        self._check_missing(ref)
        if known is not None and age_s <= self._limits.usable_s:
            self._flights.start(ref, lambda: self._ask(ref))
            return known.resolved
        if known is None and ref not in self._flights:
            self._take_lookup()
        try:
            return await self._wait(ref, self._limits.resolve_timeout_s if known is None else self._limits.stale_wait_s)
        except Unreachable:
            # The hub is down or slow: what was true a moment ago, or when it was last asked, keeps serving.
            remembered = known.resolved if known is not None else await self._hub.recall(ref)
            if remembered is None:
                raise
            return remembered

    async def close(self) -> None:
        await self._flights.close()

    async def _wait(self, ref: AdapterRef, wait_s: float) -> ResolvedAdapter:
        try:
            return await self._flights.join(ref, lambda: self._ask(ref), wait_s=wait_s)
        except TimeoutError as error:
            raise hub_is_silent(wait_s) from error

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
        asked_at, num_forgotten = self._clock(), self._num_forgotten
        try:
            resolved = await self._hub.resolve(ref)
        except (NotFound, NotAllowed) as error:
            # Private and absent look alike to those who may not know.
            missing = RepoNotFound if isinstance(error, NotAllowed) else type(error)
            refusal = missing(f"no adapter {ref} in the hub", hint=error.hint, field="model")
            self._known.pop(ref, None)
            if self._num_forgotten == num_forgotten:
                _remember(self._missing, ref, (self._clock(), refusal), self._limits.max_negative)
            raise refusal from error
        if self._num_forgotten != num_forgotten:
            # The answer may be from before the change that was told meanwhile: good for those who asked, not to keep.
            asked_at = float("-inf")
        _remember(self._known, ref, _Known(resolved, asked_at), self._limits.max_known)
        return resolved


def _remember(memory: "OrderedDict[AdapterRef, _T]", ref: AdapterRef, value: _T, limit: int) -> None:
    memory[ref] = value
    memory.move_to_end(ref)
    while len(memory) > limit:
        memory.popitem(last=False)
