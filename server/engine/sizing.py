"""How many slots and KV blocks an engine gets: what was asked for, else by the memory there is. Runs nothing."""

from dataclasses import dataclass

import torch

from loractl.adapters.byte_sizes import memory_size
from loractl.adapters.errors import WillNotFit
from loractl.adapters.host_memory import FreeMemory, free_memory
from loractl.server.engine.base_model import BaseModel
from loractl.server.engine.kernels.lora import LoraSite
from loractl.server.engine.model_shape import kv_shape, linear_shapes
from loractl.server.engine.settings import EngineSettings

# Automatic sizing takes no more: blocks that no batch fills only cost memory, and loads hide beside the steps.
_MOST_AUTO_SLOTS = 32
_MOST_AUTO_HOST_KV_BYTES = 4 << 30
_MOST_AUTO_HOST_CACHE_BYTES = 2 << 30
# Of what automatic sizing may take at all, slots get at most this; KV gets the rest.
_SLOTS_SHARE = 0.5
# Host memory beside the engine's own that adapters out of their slots may keep.
_HOST_CACHE_SHARE = 0.125


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSize:
    """What one engine holds, in numbers and bytes."""

    num_slots: int
    slot_bytes: int
    num_blocks: int
    block_bytes: int
    host_cache_bytes: int
    free: FreeMemory
    """What was free before anything of this was taken."""


def choose_size(base: BaseModel, settings: EngineSettings, *, host: FreeMemory | None = None) -> EngineSize:
    """Size slots, KV blocks and the host cache; `host` is measured if not given. Raises WillNotFit."""
    host = host or free_memory()
    first = next(base.model.parameters())
    on_card = first.device.type == "cuda"
    free = FreeMemory(int(torch.cuda.mem_get_info(first.device)[0]), "the card's free memory") if on_card else host
    budget = int(free.size_bytes * settings.memory_fraction)
    slot_bytes = _slot_bytes(base, settings)
    num_slots = settings.num_slots or _auto_slots(slot_bytes, int(budget * _SLOTS_SHARE), free)
    left = budget - num_slots * slot_bytes
    if settings.num_slots is not None:  # what an operator asks for is no part of the share
        left = int((free.size_bytes - num_slots * slot_bytes) * settings.memory_fraction)
    return EngineSize(
        num_slots=num_slots,
        slot_bytes=slot_bytes,
        num_blocks=_num_blocks(base, settings, left if on_card else min(left, _MOST_AUTO_HOST_KV_BYTES)),
        block_bytes=_block_bytes(base, settings),
        host_cache_bytes=_host_cache_bytes(settings, host),
        free=free,
    )


def describe(size: EngineSize, settings: EngineSettings) -> str:
    """Say in one line what was chosen and from what."""
    slots, kv = size.num_slots * size.slot_bytes, size.num_blocks * size.block_bytes
    return (
        f"room for {size.num_slots} adapters of rank {settings.max_rank} ({memory_size(slots)}) and "
        f"{size.num_blocks * settings.block_size} tokens in {size.num_blocks} KV blocks ({memory_size(kv)}), "
        f"host cache {memory_size(size.host_cache_bytes)}; "
        f"{memory_size(size.free.size_bytes)} were free by {size.free.limit}"
    )


def _auto_slots(slot_bytes: int, budget: int, free: FreeMemory) -> int:
    num_slots = min(budget // slot_bytes, _MOST_AUTO_SLOTS)
    if num_slots < 1:
        raise WillNotFit(
            f"a slot takes {memory_size(slot_bytes)}, and slots may take {memory_size(budget)} of {free.limit}",
            hint="serve with a smaller --max-rank, or say --slots",
        )
    return num_slots


def _num_blocks(base: BaseModel, settings: EngineSettings, size_bytes: int) -> int:
    """As many blocks as the memory takes, never more than all rows could use."""
    block_bytes = _block_bytes(base, settings)
    longest = min(base.max_model_len, settings.max_model_len or base.max_model_len)
    most = settings.max_running * (-(-longest // settings.block_size) + 1)
    if settings.kv_bytes is not None:
        size_bytes = settings.kv_bytes
    num_blocks = min(size_bytes // block_bytes, most)
    if num_blocks < 2:
        advice = "serve with fewer --slots, a smaller --max-rank, or more memory"
        raise WillNotFit(
            f"{memory_size(max(0, size_bytes))} are there for the KV cache, "
            f"a block of it takes {memory_size(block_bytes)}",
            hint=advice if settings.kv_bytes is None else "a larger --kv-bytes",
        )
    return num_blocks


def _slot_bytes(base: BaseModel, settings: EngineSettings) -> int:
    numbers = sum(
        LoraSite.numel(d_in=d_in, d_out=d_out, rank_max=settings.max_rank, with_gain=True)
        for d_in, d_out in linear_shapes(base.model)
    )
    return numbers * _dtype(base).itemsize


def _block_bytes(base: BaseModel, settings: EngineSettings) -> int:
    heads, dim = kv_shape(base.model)
    layers = base.model.config.get_text_config().num_hidden_layers
    return int(settings.block_size * layers * heads * dim * 2 * _dtype(base).itemsize)


def _host_cache_bytes(settings: EngineSettings, host: FreeMemory) -> int:
    if settings.host_cache_bytes is not None:
        return settings.host_cache_bytes
    return min(int(host.size_bytes * _HOST_CACHE_SHARE), _MOST_AUTO_HOST_CACHE_BYTES)


def _dtype(base: BaseModel) -> torch.dtype:
    found: torch.dtype = next(p.dtype for p in base.model.parameters() if p.dtype.is_floating_point)
    return found
