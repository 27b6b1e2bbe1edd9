"""Room on the device for adapters: reading, checking, loading, evicting. Knows digests and layers, no requests.

A slot is one contiguous row of a slab over all layers, so a load is one copy. Files are read by loader threads; only
that copy happens on the engine's thread, between steps.
"""

from collections import Counter, OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loractl.adapters.config import LoraSpec, read_config
from loractl.adapters.digest import CONFIG_FILE, WEIGHTS_FILE
from loractl.adapters.errors import AdapterInvalid, Incompatible, LoractlError, NotFound, Unsupported, WillNotFit
from loractl.adapters.layout import LoraLayout, lay_out
from loractl.adapters.reference import Digest
from loractl.adapters.tensors import TensorFile, open_tensors
from loractl.server.engine.kernels.linear import PackedLinear
from loractl.server.engine.kernels.lora import LoraSite
from loractl.server.engine.kv_cache import BooksError


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter ready to be copied: one slot's numbers, and the rank at each layer it reaches."""

    row: Tensor  # [numbers]
    ranks: Mapping[str, int]

    @property
    def rank(self) -> int:
        return max(self.ranks.values())

    @property
    def size_bytes(self) -> int:
        return self.row.numel() * self.row.element_size()


class AdapterSlots:
    """The slots and the host tier behind them. One thread calls everything here; loaders only read files."""

    def __init__(
        self,
        layers: Mapping[str, PackedLinear],
        *,
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
        host_cache_bytes: int,
        num_loaders: int,
    ) -> None:
        self.num_slots, self.max_rank = num_slots, max_rank
        self._layers = layers
        self._dtype = dtype
        sizes = {
            name: LoraSite.numel(d_in=x.in_features, d_out=x.out_features, rank_max=max_rank, with_gain=False)
            for name, x in layers.items()
        }
        self._num_numbers = sum(sizes.values())
        self._slab = torch.zeros(num_slots, self._num_numbers, dtype=dtype, device=device)
        self._sites = self._carve(self._slab)
        for name, layer in layers.items():
            layer.site = self._sites[name]
        self._slot_of: OrderedDict[Digest, int] = OrderedDict()  # least recently used first
        self._ranks: dict[Digest, int] = {}
        self._free = list(range(num_slots - 1, -1, -1))
        self._holders: Counter[Digest] = Counter()
        self._pinned: set[Digest] = set()
        self._host: OrderedDict[Digest, HostAdapter] = OrderedDict()
        self._host_limit_bytes = host_cache_bytes
        self._loading: dict[Digest, Future[HostAdapter]] = {}
        self._loaders = ThreadPoolExecutor(num_loaders, thread_name_prefix="adapter-loader")
        self.num_loads = self.num_evictions = self.num_failures = self.num_host_hits = 0

    def is_resident(self, digest: Digest) -> bool:
        return digest in self._slot_of

    def is_near(self, digest: Digest) -> bool:
        """Whether an adapter is resident or ready on the host."""
        future = self._loading.get(digest)
        return digest in self._slot_of or digest in self._host or (future is not None and future.done())

    def want(self, digest: Digest, folder: Path) -> None:
        """Begin to read an adapter unless it is near already; returns at once."""
        if digest not in self._slot_of and digest not in self._host and digest not in self._loading:
            self._loading[digest] = self._loaders.submit(self._read, folder)

    def failure(self, digest: Digest) -> LoractlError | None:
        """The error of a load that has failed; asking again clears it, so the next request tries anew."""
        future = self._loading.get(digest)
        if future is None or not future.done() or (error := future.exception()) is None:
            return None
        del self._loading[digest]
        self.num_failures += 1
        if isinstance(error, LoractlError):
            return error
        return AdapterInvalid(f"adapter {digest[:19]} could not be read: {error}")

    def place(self, digest: Digest) -> bool:
        """Give an adapter that is on the host a slot, evicting one that nobody holds; False where none can go."""
        if digest in self._slot_of:
            return True
        host = self._host_copy(digest)
        if host is None:
            return False
        slot = self._take_slot()
        if slot is None:
            return False
        self._slab[slot].copy_(host.row)
        for name, site in self._sites.items():
            site.set_slot(slot, rank=host.ranks.get(name, 0))
        self._slot_of[digest] = slot
        self._ranks[digest] = host.rank
        self.num_loads += 1
        return True

    def hold(self, digest: Digest) -> int:
        """Keep a resident adapter in its slot until it is let go; returns the slot."""
        self._holders[digest] += 1
        self._slot_of.move_to_end(digest)
        return self._slot_of[digest]

    def let_go(self, digest: Digest) -> None:
        self._holders[digest] -= 1
        if self._holders[digest] == 0:
            del self._holders[digest]

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
        """Forget an adapter that nobody holds."""
        self._pinned.discard(digest)
        self._host.pop(digest, None)
        if digest in self._slot_of and digest not in self._holders:
            self._evict(digest)

    def places(self) -> Mapping[Digest, int]:
        """Where each resident adapter is."""
        return self._slot_of

    def slots(self) -> list[tuple[Digest, int, bool, int]]:
        """(digest, rank, pinned, holders) of every filled slot."""
        return [(d, self._ranks[d], d in self._pinned, self._holders.get(d, 0)) for d in self._slot_of]

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
        spec = read_config((folder / CONFIG_FILE).read_bytes(), where=str(folder / CONFIG_FILE))
        self._check_spec(spec)
        self._check_layout(lay_out(open_tensors(folder / WEIGHTS_FILE).entries.values()))

    def close(self) -> None:
        self._loaders.shutdown(wait=False, cancel_futures=True)

    def _host_copy(self, digest: Digest) -> HostAdapter | None:
        future = self._loading.get(digest)
        if future is not None and future.done() and future.exception() is None:
            del self._loading[digest]
            self._host[digest] = future.result()
            self._trim_host(keep=digest)
        elif digest in self._host:
            self.num_host_hits += 1
        host = self._host.get(digest)
        if host is not None:
            self._host.move_to_end(digest)
        return host

    def _trim_host(self, *, keep: Digest) -> None:
        while sum(a.size_bytes for a in self._host.values()) > self._host_limit_bytes and len(self._host) > 1:
            oldest = next(iter(self._host))
            if oldest == keep:
                break
            del self._host[oldest]

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
        del self._ranks[digest]
        self.num_evictions += 1

    def _carve(self, slab: Tensor) -> dict[str, LoraSite]:
        sites, offset = {}, 0
        for name, layer in self._layers.items():
            d_in, d_out = layer.in_features, layer.out_features
            sites[name] = LoraSite.carve(slab, offset, d_in=d_in, d_out=d_out, rank_max=self.max_rank)
            offset += LoraSite.numel(d_in=d_in, d_out=d_out, rank_max=self.max_rank, with_gain=False)
        return sites

    def _read(self, folder: Path) -> HostAdapter:
        spec = read_config((folder / CONFIG_FILE).read_bytes(), where=str(folder / CONFIG_FILE))
        self._check_spec(spec)
        file = open_tensors(folder / WEIGHTS_FILE)
        layout = lay_out(file.entries.values())
        self._check_layout(layout)
        row = torch.zeros(1, self._num_numbers, dtype=self._dtype)
        sites = self._carve(row)
        ranks = {}
        for name, module in layout.modules.items():
            if module.a is None or module.b is None:
                raise AdapterInvalid(f"{folder}: {name} lacks one of its two matrices")
            rank = ranks[name] = module.a.shape[0]
            sites[name].a[0, :rank] = _tensor(file, module.a.name)
            sites[name].b[0, :, :rank] = _tensor(file, module.b.name) * spec.scaling_of(name)
        return HostAdapter(row[0], ranks)

    def _check_spec(self, spec: LoraSpec) -> None:
        unsupported = {
            "use_dora": spec.use_dora,
            "use_qalora": spec.use_qalora,
            "lora_bias": spec.lora_bias,
            "bias": spec.bias != "none",
            "modules_to_save": bool(spec.modules_to_save),
            "target_parameters": bool(spec.target_parameters),
            "trainable_token_indices": bool(spec.trainable_token_indices),
            "layer_replication": bool(spec.layer_replication),
            "alora_invocation_tokens": bool(spec.alora_invocation_tokens),
        }
        if named := [name for name, is_set in unsupported.items() if is_set]:
            raise Unsupported(f"the adapter uses {', '.join(named)}, which this server does not serve")
        if spec.peft_type != "LORA":
            raise Unsupported(f"the adapter is {spec.peft_type}, not LORA")

    def _check_layout(self, layout: LoraLayout) -> None:
        if layout.whole or layout.base_weights or layout.tokens:
            raise Unsupported("the adapter holds whole weights of the base, which this server does not serve")
        if not layout.modules:
            raise AdapterInvalid("the adapter changes no module")
        for name, module in layout.modules.items():
            layer = self._layers.get(name)
            if layer is None or module.is_embedding:
                raise Incompatible(f"this base has no linear layer {name} that an adapter can change")
            if module.a is None or module.b is None:
                raise AdapterInvalid(f"{name} lacks one of its two matrices")
            shape = (module.a.shape[1], module.b.shape[0])
            if shape != (layer.in_features, layer.out_features):
                raise Incompatible(
                    f"{name} is {shape} in the adapter, {layer.in_features, layer.out_features} in the base"
                )
            if module.a.shape[0] > self.max_rank:
                raise Unsupported(
                    f"rank {module.a.shape[0]} of {name} is above this server's {self.max_rank}",
                    hint=f"serve with --max-rank {module.a.shape[0]}",
                )


def _tensor(file: TensorFile, name: str) -> Tensor:
    return torch.from_numpy(file.read_float32(name).copy())
