"""Attention of packed rows over paged K and V. Knows blocks and rows; nothing of requests, adapters or prefix reuse."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loractl.server.engine.kernels import native

TILE_ROWS = 64
"""Rows of one sequence that a card's program takes."""


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Where the rows of one step read and write K and V; built once a step, read by every layer.

    Sequence s owns rows `starts[s]` to `starts[s + 1]`, which are the last of its `lengths[s]` tokens (this step's
    included), so prefill chunks and decode rows are the same thing. Token t of it lies in block `tables[s, t //
    block_size]`.
    """

    block_size: int
    tables: Tensor  # [sequences, blocks] int32
    starts: Tensor  # [sequences + 1] int32
    lengths: Tensor  # [sequences] int32
    places: Tensor  # [rows] int64: block * block_size + offset of each row's own token
    positions: Tensor  # [rows] int64: each row's index in its sequence
    bounds: tuple[tuple[int, int, int], ...]  # (first row, end row, length) as Python numbers
    num_alone: int = 0
    """On a card: so many sequences, the first ones, have one row each."""
    tiles: Tensor | None = None
    """On a card: [tiles, 2] int32, the other sequences' rows cut up: sequence, first row of its own."""

    @classmethod
    def build(
        cls,
        sequences: Sequence[tuple[int, int, Sequence[int]]],
        *,
        block_size: int,
        device: torch.device | str = "cpu",
        for_card: bool = False,
    ) -> "PagedBatch":
        """Plan a step from (new rows, tokens including them, block table) of each sequence, in the order of the
        rows."""
        width = max(len(table) for _, _, table in sequences)
        tables = torch.tensor([[*table, *([0] * (width - len(table)))] for _, _, table in sequences], dtype=torch.int32)
        counts = torch.tensor([count for count, _, _ in sequences])
        lengths = torch.tensor([length for _, length, _ in sequences])
        starts = torch.zeros(len(sequences) + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=starts[1:])
        owner = torch.repeat_interleave(torch.arange(len(sequences)), counts)
        positions = torch.arange(int(starts[-1])) - starts[owner] + (lengths - counts)[owner]
        places = tables[owner, positions // block_size].long() * block_size + positions % block_size
        edges = starts.tolist()
        num_alone = next((i for i, (count, _, _) in enumerate(sequences) if count > 1), len(sequences))
        tiles = None
        if for_card:
            late = enumerate(sequences[num_alone:], num_alone)
            cut = [(index, first) for index, (count, _, _) in late for first in range(0, count, TILE_ROWS)]
            tiles = torch.tensor(cut, dtype=torch.int32).view(-1, 2).to(device)
        return cls(
            block_size=block_size,
            tables=tables.to(device),
            starts=starts.to(device, torch.int32),
            lengths=lengths.to(device, torch.int32),
            places=places.to(device),
            positions=positions.to(device),
            bounds=tuple((edges[index], edges[index + 1], length) for index, (_, length, _) in enumerate(sequences)),
            num_alone=num_alone,
            tiles=tiles,
        )


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PagedBatch) -> None:
    """Write this step's k and v [rows, kv_heads, dim] to their places in the caches [blocks, block_size, kv_heads,
    dim]."""
    if batch.tiles is not None:
        from loractl.server.engine.kernels.cuda.paged import write_kv_on_card

        write_kv_on_card(k, v, k_cache, v_cache, batch)
        return
    library = native.library()
    if library is None or not (native.fits(k, v, k_cache, v_cache) and _plain(k, v) and _contiguous(k_cache, v_cache)):
        k_cache.view(-1, *k_cache.shape[2:])[batch.places] = k.to(k_cache.dtype)
        v_cache.view(-1, *v_cache.shape[2:])[batch.places] = v.to(v_cache.dtype)
        return
    heads = native.HeadsStruct(
        kv_heads=k.shape[1],
        dim=k.shape[2],
        k_row=k.stride(0),
        k_head=k.stride(1),
        v_row=v.stride(0),
        v_head=v.stride(1),
    )
    pointers = (tensor.data_ptr() for tensor in (k, v, k_cache, v_cache))
    plan = paged_struct(batch)
    library.loractl_write_kv(ctypes.addressof(plan), ctypes.addressof(heads), *pointers, k.dtype == torch.float32)


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention, one row and head at a time in float32: the oracle. Arguments as `paged_attention`."""
    out = torch.zeros(q.shape, dtype=torch.float32)
    group = q.shape[1] // k_cache.shape[2]
    for sequence, (start, end, length) in enumerate(batch.bounds):
        places = [
            int(batch.tables[sequence, t // batch.block_size]) * batch.block_size + t % batch.block_size
            for t in range(length)
        ]
        keys = k_cache.reshape(-1, *k_cache.shape[2:])[places].float()
        values = v_cache.reshape(-1, *v_cache.shape[2:])[places].float()
        for row in range(start, end):
            last = length - (end - row)
            first = 0 if window is None else max(0, last - window + 1)
            for head in range(q.shape[1]):
                scores = keys[first : last + 1, head // group] @ q[row, head].float() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head : head + 1].float()])
                weights = torch.softmax(scores, dim=0)[: last + 1 - first]
                out[row, head] = weights @ values[first : last + 1, head // group]
    return out.to(q.dtype)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of each row over its sequence's tokens up to itself.

    q: [rows, heads, dim]; caches: [blocks, block_size, kv_heads, dim]; heads is a multiple of kv_heads. `window` is
    how many tokens a row sees, itself included (transformers' `sliding_window`); `sinks` [heads] join the softmax
    without a value. Returns [rows, heads, dim].
    """
    if batch.tiles is not None:
        from loractl.server.engine.kernels.cuda.paged import paged_attention_on_card

        return paged_attention_on_card(
            q, k_cache, v_cache, batch, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
    library = native.library()
    if library is not None and _runs_native(q, k_cache, v_cache):
        return _native_attention(
            library, q, k_cache, v_cache, batch, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
    return paged_attention_torch(q, k_cache, v_cache, batch, scale=scale, window=window, softcap=softcap, sinks=sinks)


def paged_attention_torch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`paged_attention` in torch alone, one sequence at a time."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    heads_kv, dim = k_cache.shape[2:]
    group = q.shape[1] // heads_kv
    for sequence, (start, end, length) in enumerate(batch.bounds):
        blocks = batch.tables[sequence, : -(-length // batch.block_size)].long()
        keys = k_cache[blocks].flatten(0, 1)[:length].float()  # [length, kv_heads, dim]
        values = v_cache[blocks].flatten(0, 1)[:length].float()
        count = end - start
        queries = (
            q[start:end].float().view(count, heads_kv, group, dim).permute(1, 2, 0, 3)
        )  # [kv_heads, group, count, dim]
        scores = queries @ keys.permute(1, 2, 0)[:, None] * scale  # [kv_heads, group, count, length]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        hidden = _hidden(count, length, window)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            extra = sinks.float().view(heads_kv, group, 1, 1).expand(-1, -1, count, 1)
            weights = torch.softmax(torch.cat([scores, extra], dim=-1), dim=-1)[..., :-1]
        else:
            weights = torch.softmax(scores, dim=-1)
        mixed = weights @ values.permute(1, 0, 2)[:, None]  # [kv_heads, group, count, dim]
        out[start:end] = mixed.permute(2, 0, 1, 3).reshape(count, -1, dim).to(out.dtype)
    return out


def _hidden(count: int, length: int, window: int | None) -> Tensor:
    """Which of `length` tokens the last `count` of them may not see: [count, length]."""
    row = torch.arange(length - count, length)[:, None]
    token = torch.arange(length)[None]
    hidden = token > row
    return hidden if window is None else hidden | (token <= row - window)


def _native_attention(
    library: ctypes.CDLL,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype)
    wide_sinks = None if sinks is None else sinks.float().contiguous()
    heads = native.HeadsStruct(
        heads=q.shape[1],
        kv_heads=k_cache.shape[2],
        dim=q.shape[2],
        q_row=q.stride(0),
        q_head=q.stride(1),
        window=window or 0,
        sinks=None if wide_sinks is None else wide_sinks.data_ptr(),
        scale=scale,
        softcap=softcap or 0.0,
    )
    plan = paged_struct(batch)
    pointers = (tensor.data_ptr() for tensor in (q, k_cache, v_cache, out))
    library.loractl_attention(
        ctypes.addressof(plan), ctypes.addressof(heads), *pointers, q.dtype == torch.float32, torch.get_num_threads()
    )
    return out


def _runs_native(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether the compiled kernel takes these shapes: whole dwords a row, at most 12 query heads to a kv head."""
    group = q.shape[1] // k_cache.shape[2]
    whole = q.shape[2] * q.element_size() % 4 == 0 and q.storage_offset() * q.element_size() % 4 == 0
    return whole and group <= 12 and native.fits(q, k_cache, v_cache) and _plain(q) and _contiguous(k_cache, v_cache)


def _plain(*tensors: Tensor) -> bool:
    return all(tensor.stride(-1) == 1 for tensor in tensors)


def _contiguous(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors)


def paged_struct(batch: PagedBatch) -> native.PagedStruct:
    """The plan as the kernels read it; it lives as long as the batch."""
    return native.PagedStruct(
        tables=batch.tables.data_ptr(),
        starts=batch.starts.data_ptr(),
        lengths=batch.lengths.data_ptr(),
        places=batch.places.data_ptr(),
        table_width=batch.tables.shape[1],
        num_sequences=batch.tables.shape[0],
        block_size=batch.block_size,
        num_rows=batch.places.shape[0],
    )
