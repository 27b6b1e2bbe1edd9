"""Adds each row's adapters on a card: rows sorted by slot, cut into chunks of one slot each. Two launches a layer.

`shrink` makes the rank-wide middle in float32, its inputs cut into parts that depend on the layer alone, so that no
neighbour changes a row's sums; `expand` adds the parts up and the product to the output. Programs beyond a slot's own
rank end at once, so a small adapter does not pay for the largest.
"""

# Triton compiles annotations as code, and a launch takes other types than its kernel and options besides.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# mypy: disallow-untyped-decorators=False
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from loractl.server.engine.kernels.cuda.launch import INTERPRETED, block, precision, widens
from loractl.server.engine.kernels.lora import GAIN_BIT, LoraSite, RowChunks

_RANKS = 16
"""Ranks that one program of `shrink` makes: the least that a product of tiles takes."""
_LEAST_PART = 1024
_MOST_PARTS = 8


@triton.jit
def _shrink(
    x,
    a,
    middle,
    slots,
    rows,
    codes,
    d_in,
    part_size,
    num_chunks,
    x_row,
    a_slot,
    codes_slot,
    rank_max,
    CHUNK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk, rank_block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + chunk).to(tl.int64)
    if slot < 0:
        return
    rank = tl.load(codes + slot * codes_slot) & 0xFFFF
    if rank_block * RANKS >= rank:
        return
    i, r, k = tl.arange(0, CHUNK), rank_block * RANKS + tl.arange(0, RANKS), tl.arange(0, BLOCK_K)
    row = tl.load(rows + chunk * CHUNK + i).to(tl.int64)
    first = part * part_size
    end = tl.minimum(first + part_size, d_in)
    x_rows = x + row[:, None] * x_row
    a_rows = a + slot * a_slot + r[None, :] * d_in
    total = tl.zeros((CHUNK, RANKS), dtype=tl.float32)
    for start in range(first, end, BLOCK_K):
        at = start + k
        left = tl.load(x_rows + at[None, :], mask=(row[:, None] >= 0) & (at[None, :] < end), other=0.0)
        right = tl.load(a_rows + at[:, None], mask=(r[None, :] < rank) & (at[:, None] < end), other=0.0)
        if WIDE:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total += tl.dot(left, right, input_precision=PRECISION)
    place = (part * num_chunks + chunk).to(tl.int64) * CHUNK + i[:, None]
    tl.store(middle + place * rank_max + r[None, :], total, mask=r[None, :] < rank)


@triton.jit
def _expand(
    out,
    base,
    bias,
    middle,
    b,
    gain,
    slots,
    rows,
    weights,
    codes,
    first_chunk,
    num_chunks,
    d_out,
    out_row,
    b_slot,
    gain_slot,
    codes_slot,
    rank_max,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GAIN_BIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk = first_chunk + tl.program_id(0)
    slot = tl.load(slots + chunk).to(tl.int64)
    if slot < 0:
        return
    code = tl.load(codes + slot * codes_slot)
    if code == 0:
        return
    rank = code & 0xFFFF
    i, n = tl.arange(0, CHUNK), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(rows + chunk * CHUNK + i).to(tl.int64)
    weight = tl.load(weights + chunk * CHUNK + i)
    inside = (row[:, None] >= 0) & (n[None, :] < d_out)
    total = tl.zeros((CHUNK, BLOCK_N), dtype=tl.float32)
    for start in range(0, rank, RANKS):
        r = start + tl.arange(0, RANKS)
        hidden = tl.zeros((CHUNK, RANKS), dtype=tl.float32)
        for part in range(PARTS):
            place = (part * num_chunks + chunk).to(tl.int64) * CHUNK + i[:, None]
            hidden += tl.load(middle + place * rank_max + r[None, :], mask=r[None, :] < rank, other=0.0)
        right = tl.load(
            b + slot * b_slot + r[:, None] * d_out + n[None, :],
            mask=(r[:, None] < rank) & (n[None, :] < d_out),
            other=0.0,
        )
        total += tl.dot(hidden * weight[:, None], right.to(tl.float32), input_precision=PRECISION)
    at = row[:, None] * out_row + n[None, :]
    if HAS_GAIN:
        own = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            own -= tl.load(bias + n, mask=n < d_out, other=0.0).to(tl.float32)[None, :]
        width = tl.where(code >= GAIN_BIT, d_out, 0)
        factor = tl.load(gain + slot * gain_slot + n, mask=n < width, other=0.0).to(tl.float32)
        total += own * factor[None, :] * weight[:, None]
    before = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (before + total).to(out.dtype.element_ty), mask=inside)


def add_lora_on_card(
    out: Tensor, x: Tensor, site: LoraSite, chunks: RowChunks, *, bias: Tensor | None, with_gain: bool
) -> None:
    """Add the adapters' part to `out` [rows, d_out] in place; arguments as `lora.add_lora`.

    `with_gain`: whether some adapter of the step may bring DoRA's factor here.
    """
    num_chunks, size = chunks.rows.shape
    rank_max, d_in, d_out = site.a.shape[1], site.a.shape[2], site.b.shape[1]
    codes = site.codes
    assert out.stride(1) == 1
    x = x if x.stride(1) == 1 else x.contiguous()
    parts = max(1, min(_MOST_PARTS, d_in // _LEAST_PART))
    block_k = block(d_in, most=256 if INTERPRETED else 128)
    part_size = -(-d_in // parts // block_k) * block_k
    parts = -(-d_in // part_size)
    middle = torch.empty(parts, num_chunks, size, rank_max, dtype=torch.float32, device=x.device)
    _shrink[(num_chunks, -(-rank_max // _RANKS), parts)](
        x,
        site.a,
        middle,
        chunks.slots,
        chunks.rows,
        codes,
        d_in,
        part_size,
        num_chunks,
        x.stride(0),
        site.a.stride(0),
        codes.stride(0),
        rank_max,
        CHUNK=size,
        RANKS=_RANKS,
        BLOCK_K=block_k,
        WIDE=widens(x.dtype),
        PRECISION=precision(x.dtype),
        num_warps=4,
        num_stages=3,
    )
    gain = site.gain if with_gain else None
    base = out.clone() if gain is not None else out
    block_n = block(d_out, most=256 if INTERPRETED else 128)
    for first, end in chunks.rounds:
        _expand[(end - first, -(-d_out // block_n))](
            out,
            base,
            out if bias is None else bias,
            middle,
            site.b,
            out if gain is None else gain,
            chunks.slots,
            chunks.rows,
            chunks.weights,
            codes,
            first,
            num_chunks,
            d_out,
            out.stride(0),
            site.b.stride(0),
            0 if gain is None else gain.stride(0),
            codes.stride(0),
            rank_max,
            PARTS=parts,
            CHUNK=size,
            RANKS=_RANKS,
            BLOCK_N=block_n,
            HAS_GAIN=gain is not None,
            HAS_BIAS=bias is not None,
            GAIN_BIT=GAIN_BIT,
            PRECISION=precision(x.dtype),
            num_warps=4,
            num_stages=3,
        )
