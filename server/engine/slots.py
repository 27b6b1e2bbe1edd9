"""Room on the device for adapters: loading, holding, evicting. Knows digests, no requests and no file formats.

A slot is one contiguous row of a slab over all layers, so a load is one copy. Files are read by loader threads; only
that copy happens on the engine's thread, between steps.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from loractl.adapters.errors import LoractlError, NotFound, WillNotFit
from loractl.adapters.reference import Digest
from loractl.server.engine.adapter_reading import AdapterReader, HostAdapter, ServedLayers
from loractl.server.engine.kernels import device as devices
from loractl.server.engine.kernels import native
from loractl.server.engine.kv_cache import BooksError
from loractl.server.engine.load_books import LoadFailures, LoadTimes
from loractl.server.engine.sequence import AdapterKey
from loractl.server.engine.side_lora import SideSite
from loractl.server.engine.slab_copies import SlabCopies, make_lane
from loractl.server.engine.stats import SlotStats


@dataclass(frozen=True, slots=True)
class _Read:
    """An adapter as a loader read it, and the seconds that took."""

    adapter: HostAdapter
    seconds: float


class AdapterSlots:
    """The slots and the host tier behind them. One thread calls everything here; loaders only read files."""

    def __init__(
        self,
        layers: ServedLayers,
        *,
        sides: Mapping[str, SideSite],
        num_slots: int,
        max_rank: int,
        truncate_rank: bool,
        dtype: torch.dtype,
        device: torch.device,
        host_cache_bytes: int,
        num_loaders: int,
    ) -> None:
        self.num_slots, self.max_rank = num_slots, max_rank
        self._device = device
        self._sides = sides
        self._reader = AdapterReader(
            layers, max_rank=max_rank, truncate_rank=truncate_rank, dtype=dtype, pin=device.type == "cuda"
        )
        self._slab = native.zeros(num_slots, self._reader.num_numbers, dtype=dtype, device=device)
        self._sites = self._reader.carve(self._slab)
        for name, layer in layers.linear.items():
            layer.site = self._sites[name]
        self._copies: SlabCopies | None = None
        if devices.runs_on_card(device):
            self._copies = SlabCopies(self._slab, list(self._sites.values()), lane=make_lane(device))
        self._slot_of: OrderedDict[Digest, int] = OrderedDict()  # least recently used first
        self._shown: dict[Digest, tuple[int, float]] = {}
        self._free = list(range(num_slots - 1, -1, -1))
        self._holders: Counter[Digest] = Counter()
        self._pinned: set[Digest] = set()
        self._host: OrderedDict[Digest, HostAdapter] = OrderedDict()
        self.host_limit_bytes = host_cache_bytes
        self._loading: dict[Digest, Future[_Read]] = {}
        self.failures = LoadFailures()
        self.times = LoadTimes()
        self._leaving: set[Digest] = set()
        self._loaders = ThreadPoolExecutor(
            num_loaders, thread_name_prefix="adapter-loader", initializer=native.run_alone
        )
        self.num_loads = self.num_evictions = self.num_failures = self.num_host_hits = self.num_host_evictions = 0

    @property
    def slab_bytes(self) -> int:
        """Device memory of all slots."""
        return self._slab.nbytes

    def is_resident(self, digest: Digest) -> bool:
        return digest in self._slot_of

    def is_near(self, digest: Digest) -> bool:
        """Whether an adapter is resident or ready on the host."""
        future = self._loading.get(digest)
        return digest in self._slot_of or digest in self._host or (future is not None and future.done())

    def want(self, digest: Digest, folder: Path) -> None:
        """Begin to read an adapter unless it is near, or failed a moment ago; returns at once."""
        is_known = digest in self._slot_of or digest in self._host or digest in self._loading
        if not is_known and self.failures.recent(digest) is None:
            self._loading[digest] = self._loaders.submit(self._read, folder)

    def await_read(self, digests: Iterable[Digest], timeout_s: float) -> bool:
        """Wait until one of these, which are being read, is there or has failed; False where none was in time."""
        reads = [self._loading[digest] for digest in digests if digest in self._loading]
        return bool(wait(reads, timeout_s, FIRST_COMPLETED).done)

    def _read(self, folder: Path) -> _Read:
        started = time.monotonic()
        return _Read(self._reader.read(folder), time.monotonic() - started)

    def failure(self, digest: Digest) -> LoractlError | None:
        """The error of a load that has failed, for all who wait; it is tried again after a time that doubles."""
        future = self._loading.get(digest)
        if future is not None and future.done() and (error := future.exception()) is not None:
            del self._loading[digest]
            self.num_failures += 1
            self.times.failed(self.failures.note(digest, error))
        return self.failures.recent(digest)

    def place(self, digest: Digest) -> bool:
        """Give an adapter that is on the host a slot, evicting one that nobody holds; False where none can go, and
        while a copy beside the steps goes on."""
        if digest in self._slot_of:
            return self._has_arrived(digest)
        host = self._host_copy(digest)
        if host is None:
            return False
        slot = self._take_slot()
        if slot is None:
            return False
        self.times.copy_begins(digest)
        for name, site in self._sites.items():
            site.set_slot(slot, rank=host.ranks.get(name, 0), has_gain=name in host.gains)
        if self._copies is None:
            self._slab[slot].copy_(host.row)
        else:
            self._copies.begin(slot, host.row)
        for name, side in self._sides.items():
            part = host.sides.get(name)
            side.set_slot(slot, None if part is None else part.to(self._device))
        self._slot_of[digest] = slot
        self._shown[digest] = (host.rank, host.energy_kept)
        self.num_loads += 1
        return self._has_arrived(digest)

    def _has_arrived(self, digest: Digest) -> bool:
        """Whether steps may read the slot of a digest that has one."""
        has_arrived = self._copies is None or self._copies.has_arrived(self._slot_of[digest])
        if has_arrived:
            self.times.has_arrived(digest)
        return has_arrived

    def hold(self, digest: Digest) -> int:
        """Keep a resident adapter in its slot until it is let go; returns the slot."""
        self._leaving.discard(digest)  # asked for again
        self._holders[digest] += 1
        self._slot_of.move_to_end(digest)
        return self._slot_of[digest]

    def let_go(self, digest: Digest) -> None:
        self._holders[digest] -= 1
        if self._holders[digest] == 0:
            del self._holders[digest]
            if digest in self._leaving:
                self.unload(digest)

    def could_hold(self, digests: Iterable[Digest]) -> bool:
        """Whether there would be slots for all of these at once if nobody held any."""
        wanted = set(digests)
        return len(self._pinned | wanted) <= self.num_slots

    def pin(self, digest: Digest) -> None:
        """Never evict this adapter; one slot always stays unpinned. Raises NotFound or WillNotFit."""
        if digest not in self._slot_of:
            raise NotFound(f"adapter {digest[:19]} is not resident", hint="load it first")
        if digest not in self._pinned and len(self._pinned) + 1 >= self.num_slots:
            raise WillNotFit("all slots but one are pinned", hint="unpin an adapter, or serve with more --slots")
        self._pinned.add(digest)

    def unpin(self, digest: Digest) -> None:
        self._pinned.discard(digest)

    def unload(self, digest: Digest) -> None:
        """Forget an adapter, and the failure of its load, as soon as nobody holds it."""
        self._pinned.discard(digest)
        self._host.pop(digest, None)
        self.failures.forget(digest)
        self._leaving.discard(digest)
        if digest in self._holders:
            self._leaving.add(digest)
        elif digest in self._slot_of:
            self._evict(digest)
        else:
            self.times.forget(digest)

    def places(self, key: AdapterKey) -> tuple[tuple[int, float], ...]:
        """The slots and weights of a sequence's adapters, which are resident."""
        return tuple((self._slot_of[digest], weight) for digest, weight in key)

    def slots(self) -> tuple[SlotStats, ...]:
        """Every filled slot, least recently used first."""
        return tuple(
            SlotStats(
                digest=digest,
                rank=rank,
                pinned=digest in self._pinned,
                num_running=self._holders.get(digest, 0),
                energy_kept=energy_kept,
            )
            for digest in self._slot_of
            for rank, energy_kept in [self._shown[digest]]
        )

    def host(self) -> tuple[tuple[Digest, ...], int]:
        """Digests on the host tier, and their bytes."""
        return tuple(self._host), sum(adapter.size_bytes for adapter in self._host.values())

    def check(self, holders: Counter[Digest]) -> None:
        """Raise BooksError unless slots and holders are as booked."""
        used = list(self._slot_of.values())
        if sorted(used + self._free) != list(range(self.num_slots)):
            raise BooksError(f"slots {sorted(used)} used and {sorted(self._free)} free are not {self.num_slots}")
        if +holders != +self._holders:
            raise BooksError(f"slots are held {dict(self._holders)}, requests hold {dict(holders)}")

    def check_servable(self, folder: Path) -> None:
        """Raise Incompatible, Unsupported or AdapterInvalid unless a slot can hold the adapter in `folder`."""
        self._reader.check(folder)

    def close(self) -> None:
        self._loaders.shutdown(wait=False, cancel_futures=True)
        self._host.clear()
        self._copies, self._sites, self._slab = None, {}, self._slab.new_empty(0)

    def _host_copy(self, digest: Digest) -> HostAdapter | None:
        future = self._loading.get(digest)
        if future is not None and future.done() and future.exception() is None:
            del self._loading[digest]
            self.failures.forget(digest)
            read = future.result()
            self._host[digest] = read.adapter
            self.times.was_read(digest, read.seconds)
            self._trim_host(keep=digest)
        elif digest in self._host:
            self.num_host_hits += 1
        host = self._host.get(digest)
        if host is not None:
            self._host.move_to_end(digest)
        return host

    def _trim_host(self, *, keep: Digest) -> None:
        while sum(a.size_bytes for a in self._host.values()) > self.host_limit_bytes and len(self._host) > 1:
            oldest = next(iter(self._host))
            if oldest == keep:
                break
            del self._host[oldest]
            if oldest not in self._slot_of:
                self.times.forget(oldest)
            self.num_host_evictions += 1

    def _take_slot(self) -> int | None:
        if not self._free:
            idle = (d for d in self._slot_of if d not in self._holders and d not in self._pinned)
            victim = next(idle, None)
            if victim is None:
                return None
            self._evict(victim)
        return self._free.pop()

    def _evict(self, digest: Digest) -> None:
        self._free.append(self._slot_of.pop(digest))
        del self._shown[digest]
        self.times.forget(digest)
        self.num_evictions += 1
