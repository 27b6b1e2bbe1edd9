"""The calls to the hub from the event loop: each in a thread, bounded in time, through the breaker, and counted."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from loractl.adapters.errors import LoractlError, Unreachable
from loractl.adapters.reference import AdapterRef
from loractl.hub.client_records import ResolvedAdapter
from loractl.server.fetch.breaker import Breaker

_T = TypeVar("_T")


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
    """The blocking calls that are made here; `HubReader` binds them to a client and a cache."""

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


class HubCalls:
    """One hub's calls. Those that ask it raise Unreachable at once while the breaker is open."""

    def __init__(
        self,
        hub: HubSide,
        *,
        limits: FetchLimits,
        clock: Callable[[], float],
        on_call: Callable[[str, str, float], None],
    ) -> None:
        self.breaker = Breaker(clock=clock)
        self._hub = hub
        self._limits = limits
        self._on_call = on_call
        # Resolves must not queue behind downloads.
        self._resolvers = ThreadPoolExecutor(max_workers=8, thread_name_prefix="hub-resolve")
        self._downloaders = ThreadPoolExecutor(max_workers=4, thread_name_prefix="hub-fetch")

    async def resolve(self, ref: AdapterRef) -> ResolvedAdapter:
        """Ask what a name means."""
        return await self._guarded(
            "resolve", self._resolvers, lambda: self._hub.resolve(ref), timeout_s=self._limits.resolve_timeout_s
        )

    async def recall(self, ref: AdapterRef) -> ResolvedAdapter | None:
        """As `HubSide.recall`."""
        return await asyncio.to_thread(self._hub.recall, ref)

    async def cached(self, resolved: ResolvedAdapter) -> Path | None:
        """As `HubSide.cached`; needs no hub, so it does not wait for the breaker either."""
        return await asyncio.get_running_loop().run_in_executor(self._downloaders, self._hub.cached, resolved)

    async def fetch(self, resolved: ResolvedAdapter) -> Path:
        """Download an adapter."""
        return await self._guarded(
            "fetch", self._downloaders, lambda: self._hub.fetch(resolved), timeout_s=self._limits.download_timeout_s
        )

    def close(self) -> None:
        self._resolvers.shutdown(wait=False, cancel_futures=True)
        self._downloaders.shutdown(wait=False, cancel_futures=True)

    async def _guarded(self, op: str, threads: ThreadPoolExecutor, call: Callable[[], _T], *, timeout_s: float) -> _T:
        wait_s = self.breaker.seconds_to_wait()
        if wait_s > 0:
            raise hub_down("the hub has not answered lately", wait_s)
        code, started = "ok", time.monotonic()
        try:
            result = await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(threads, call), timeout_s)
        except TimeoutError as error:
            code = "timeout"
            self.breaker.failed()
            raise hub_is_silent(timeout_s) from error
        except Unreachable as error:
            code = "unreachable"
            self.breaker.failed()
            raise hub_down(error.message, error.retry_after_s or 2.0) from error
        except LoractlError as error:
            code = error.code.lower()
            self.breaker.succeeded()  # it answered, if not as we wished
            raise
        finally:
            self._on_call(op, code, time.monotonic() - started)
        self.breaker.succeeded()
        return result


def hub_down(message: str, retry_after_s: float) -> Unreachable:
    """What a request is told that needs the hub and cannot have it."""
    return Unreachable(
        message,
        hint="adapters in this server's cache and the base keep serving; try again soon",
        field="model",
        retry_after_s=retry_after_s,
    )


def hub_is_silent(waited_s: float) -> Unreachable:
    """As `hub_down`, after waiting."""
    return hub_down(f"the hub did not answer in {waited_s:g} s", 2.0)
