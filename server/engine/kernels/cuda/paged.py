"""Attention over paged K and V on a card. One row a sequence: its tokens are cut into parts, and the parts merged; how
many depends on the sequence's own length alone, so that no neighbour changes a sum. More rows: tiles of rows.
"""

# Triton compiles annotations as code, and a launch takes other types than its kernel and options besides.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# mypy: disallow-untyped-decorators=False
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loractl.server.engine.kernels.attention import TILE_ROWS, PagedBatch
from loractl.server.engine.kernels.cuda.launch import INTERPRETED, block, precision, widens

_PARTS = 2 if INTERPRETED else 8
_LEAST_PART = 32 if INTERPRETED else 128
_TOKENS = 16 if INTERPRETED else 64


@triton.jit
def _write(
    k, v, k_cache, v_cache, places, width, k_row, v_row, k_head,
    v_head, dim, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(places + row)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    head, d = at // dim, at % dim
    key = tl.load(k + row * k_row + head * k_head + d, mask=inside)
    value = tl.load(v + row * v_row + head * v_head + d, mask=inside)
    tl.store(k_cache + place * width + at, key.to(k_cache.dtype.element_ty), mask=inside)
    tl.store(v_cache + place * width + at, value.to(v_cache.dtype.element_ty), mask=inside)


@triton.jit
def _part_size(count, PARTS: tl.constexpr, LEAST: tl.constexpr, TOKENS: tl.constexpr):
    size = tl.cdiv(tl.cdiv(count, PARTS), TOKENS) * TOKENS
    return tl.maximum(size, LEAST)


@triton.jit
def _decode(
    q, k_cache, v_cache, sums, tops, totals, tables, lengths, scale,
    softcap, window, q_row, q_head, table_row, num_heads, kv_heads,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, PARTS: tl.constexpr, LEAST: tl.constexpr, HAS_CAP: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row, kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    first = tl.maximum(length - window, 0)
    size = _part_size(length - first, PARTS, LEAST, TOKENS)
    begin = first + part * size
    end = tl.minimum(begin + size, length)
    g, d, t = tl.arange(0, ROWS), tl.arange(0, BLOCK_D), tl.arange(0, TOKENS)
    head = kv_head * GROUP + g
    mine = g < GROUP
    query = tl.load(
        q + row * q_row + head[:, None] * q_head + d[None, :], mask=mine[:, None] & (d[None, :] < DIM), other=0.0
    )
    if WIDE:
        query = query.to(tl.float32)
    top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    mixed = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    for start in range(begin, end, TOKENS):
        token = start + t
        seen = token < end
        table = tl.load(tables + row * table_row + token // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        place = ((table * BLOCK_SIZE + token % BLOCK_SIZE) * kv_heads + kv_head) * DIM
        key = tl.load(k_cache + place[None, :] + d[:, None], mask=seen[None, :] & (d[:, None] < DIM), other=0.0)
        value = tl.load(v_cache + place[:, None] + d[None, :], mask=seen[:, None] & (d[None, :] < DIM), other=0.0)
        if WIDE:
            key, value = key.to(tl.float32), value.to(tl.float32)
        scores = tl.dot(query, key, input_precision=PRECISION) * scale
        if HAS_CAP:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        shrunk = tl.exp(top - higher)
        weight = tl.exp(scores - higher[:, None])
        total = total * shrunk + tl.sum(weight, axis=1)
        mixed = mixed * shrunk[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
        top = higher
    at = (row * num_heads + head) * PARTS + part
    tl.store(tops + at, top, mask=mine)
    tl.store(totals + at, total, mask=mine)
    if begin < end:
        tl.store(sums + at[:, None] * BLOCK_D + d[None, :], mixed, mask=mine[:, None])


@triton.jit
def _merge(
    out, sums, tops, totals, sinks, num_heads, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p, d = tl.arange(0, PARTS), tl.arange(0, BLOCK_D)
    at = (row * num_heads + head) * PARTS + p
    top, total = tl.load(tops + at), tl.load(totals + at)
    there = total > 0
    highest = tl.max(top, axis=0)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        highest = tl.maximum(highest, sink)
    highest = tl.where(highest == float("-inf"), 0.0, highest)  # a row that only fills the batch up
    weight = tl.where(there, tl.exp(top - highest), 0.0)
    whole = tl.sum(weight * total, axis=0)
    if HAS_SINKS:
        whole += tl.exp(sink - highest)
    parts = tl.load(sums + at[:, None] * BLOCK_D + d[None, :], mask=there[:, None], other=0.0)
    mixed = tl.sum(parts * weight[:, None], axis=0) / tl.where(whole > 0, whole, 1.0)
    place = (row * num_heads + head) * DIM
    tl.store(out + place + d, mixed.to(out.dtype.element_ty), mask=d < DIM)


@triton.jit
def _prefill(
    q, k_cache, v_cache, out, tables, starts, lengths, tiles, sinks,
    scale, softcap, window, q_row, q_head, table_row, num_heads, kv_heads,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SINKS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    sequence, offset = tl.load(tiles + 2 * tile).to(tl.int64), tl.load(tiles + 2 * tile + 1)
    start, stop = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    length = tl.load(lengths + sequence)
    i, d, t = tl.arange(0, ROWS), tl.arange(0, BLOCK_D), tl.arange(0, TOKENS)
    row = (start + offset + i).to(tl.int64)
    mine = row < stop
    position = length - (stop - start) + offset + i
    before = length - (stop - start) + offset
    query = tl.load(
        q + row[:, None] * q_row + head * q_head + d[None, :], mask=mine[:, None] & (d[None, :] < DIM), other=0.0
    )
    if WIDE:
        query = query.to(tl.float32)
    top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    mixed = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    kv_head = head // GROUP
    begin = tl.maximum(before - window + 1, 0) // TOKENS * TOKENS
    end = tl.minimum(before + ROWS, length)
    for first in range(begin, end, TOKENS):
        token = first + t
        inside = token < end
        table = tl.load(tables + sequence * table_row + token // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        place = ((table * BLOCK_SIZE + token % BLOCK_SIZE) * kv_heads + kv_head) * DIM
        key = tl.load(k_cache + place[None, :] + d[:, None], mask=inside[None, :] & (d[:, None] < DIM), other=0.0)
        value = tl.load(v_cache + place[:, None] + d[None, :], mask=inside[:, None] & (d[None, :] < DIM), other=0.0)
        if WIDE:
            key, value = key.to(tl.float32), value.to(tl.float32)
        scores = tl.dot(query, key, input_precision=PRECISION) * scale
        if HAS_CAP:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
        seen = (token[None, :] <= position[:, None]) & (token[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
        shrunk = tl.exp(top - safe)
        weight = tl.exp(scores - safe[:, None])
        total = total * shrunk + tl.sum(weight, axis=1)
        mixed = mixed * shrunk[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
        top = higher
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        higher = tl.maximum(top, sink)
        shrunk = tl.exp(top - higher)
        total = total * shrunk + tl.exp(sink - higher)
        mixed = mixed * shrunk[:, None]
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    place = (row[:, None] * num_heads + head) * DIM + d[None, :]
    tl.store(out + place, mixed.to(out.dtype.element_ty), mask=mine[:, None] & (d[None, :] < DIM))


def write_kv_on_card(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PagedBatch) -> None:
    """As `attention.write_kv`."""
    rows, heads, dim = k.shape
    k, v = (part if part.stride(2) == 1 else part.contiguous() for part in (k, v))
    size = block(heads * dim, most=1024)
    _write[(rows, -(-heads * dim // size))](
        k, v, k_cache, v_cache, batch.places, heads * dim, k.stride(0), v.stride(0), k.stride(1), v.stride(1), dim,
        BLOCK=size,
    )  # fmt: skip


def paged_attention_on_card(
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
    """As `attention.paged_attention`; the batch has been planned for a card."""
    assert batch.tiles is not None
    q = q if q.stride(2) == 1 else q.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    heads, dim = q.shape[1], q.shape[2]
    block_size, kv_heads = k_cache.shape[1], k_cache.shape[2]
    group, block_d = heads // kv_heads, block(dim)
    sees = window or 1 << 30
    shared: dict[str, Any] = {
        "DIM": dim, "BLOCK_D": block_d, "BLOCK_SIZE": block_size, "GROUP": group, "TOKENS": _TOKENS,
        "HAS_CAP": softcap is not None, "WIDE": widens(q.dtype), "PRECISION": precision(q.dtype), "num_warps": 4,
    }  # fmt: skip
    alone = batch.num_alone
    if alone:
        sums = torch.empty(alone, heads, _PARTS, block_d, dtype=torch.float32, device=q.device)
        tops, totals = torch.empty(2, alone, heads, _PARTS, dtype=torch.float32, device=q.device)
        _decode[(alone, kv_heads, _PARTS)](
            q, k_cache, v_cache, sums, tops, totals, batch.tables, batch.lengths, scale, softcap or 1.0, sees,
            q.stride(0), q.stride(1), batch.tables.stride(0), heads, kv_heads,
            ROWS=block(group), PARTS=_PARTS, LEAST=_LEAST_PART, num_stages=2, **shared,
        )  # fmt: skip
        _merge[(alone, heads)](
            out, sums, tops, totals, out if sinks is None else sinks, heads,
            DIM=dim, BLOCK_D=block_d, PARTS=_PARTS, HAS_SINKS=sinks is not None,
        )  # fmt: skip
    if batch.tiles.shape[0]:
        _prefill[(batch.tiles.shape[0], heads)](
            q, k_cache, v_cache, out, batch.tables, batch.starts, batch.lengths, batch.tiles,
            out if sinks is None else sinks, scale, softcap or 1.0, sees, q.stride(0), q.stride(1),
            batch.tables.stride(0), heads, kv_heads,
            ROWS=TILE_ROWS, HAS_SINKS=sinks is not None, num_stages=2, **shared,
        )  # fmt: skip
    return out
