"""bitsandbytes' int8 weights times rows quantized on the way, on a card. Sums are integers, so no order changes them.

Few rows: the weights are what is read, once, as int8. Many rows: tiles on the int8 tensor cores. Both scales and the
bias are applied to the sums before anything is written.
"""

# Triton compiles annotations as code, and a launch takes other types than its kernel and options besides.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# mypy: disallow-untyped-decorators=False
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from loractl.server.engine.kernels.cuda.launch import INTERPRETED, block


@triton.jit
def _quantize(x, codes, scales, d, x_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, d, BLOCK):
        value = tl.load(x + row * x_row + start + at, mask=start + at < d, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    absmax = tl.max(largest, axis=0)
    factor = tl.where(absmax > 0, tl.div_rn(127.0, tl.where(absmax > 0, absmax, 1.0)), 0.0)
    for start in range(0, d, BLOCK):
        inside = start + at < d
        value = tl.load(x + row * x_row + start + at, mask=inside, other=0.0).to(tl.float32) * factor
        # adding and taking off 1.5 * 2^23 rounds to the nearest, ties to even
        rounded = (value + 12582912.0) - 12582912.0
        tl.store(codes + row * d + start + at, rounded.to(tl.int8), mask=inside)
    tl.store(scales + row, tl.div_rn(absmax, 127.0))


@triton.jit
def _matmul(
    x,
    weight,
    out,
    x_scale,
    row_scale,
    bias,
    num_rows,
    d_out,
    d_in,
    out_row,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    # Tiles of the same rows follow each other in groups, so that rows and weights are found in the cache.
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(d_out, BLOCK_N)
    number = tl.program_id(0)
    in_group = TOGETHER * tiles_n
    first_m = number // in_group * TOGETHER
    height = tl.minimum(tiles_m - first_m, TOGETHER)
    tile_m = first_m + number % in_group % height
    tile_n = number % in_group // height
    m, n = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    left_rows = x + m.to(tl.int64)[:, None] * d_in
    right_rows = weight + n.to(tl.int64)[None, :] * d_in
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, d_in, BLOCK_K):
        at = start + k
        left = tl.load(left_rows + at[None, :], mask=(m[:, None] < num_rows) & (at[None, :] < d_in), other=0)
        right = tl.load(right_rows + at[:, None], mask=(n[None, :] < d_out) & (at[:, None] < d_in), other=0)
        total = tl.dot(left, right, total, out_dtype=tl.int32)
    left_scale = tl.load(x_scale + m, mask=m < num_rows, other=0.0)
    right_scale = tl.load(row_scale + n, mask=n < d_out, other=0.0)
    value = total.to(tl.float32) * (left_scale[:, None] * right_scale[None, :])
    if HAS_BIAS:
        value += tl.load(bias + n, mask=n < d_out, other=0.0).to(tl.float32)[None, :]
    inside = (m[:, None] < num_rows) & (n[None, :] < d_out)
    place = m.to(tl.int64)[:, None] * out_row + n[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def quantize_rows_on_card(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `linear.quantize_rows`: x [rows, d] as int8, and each row's scale [rows] float32."""
    rows, d = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = torch.empty(rows, d, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        # unfused, so that ties round as on a CPU
        options = {"num_warps": 8, "enable_fp_fusion": False}
        _quantize[(rows,)](x, codes, scales, d, x.stride(0), BLOCK=block(d, most=4096), **options)
    return codes, scales


def int8_linear_on_card(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    tile: Mapping[str, int] | None = None,
) -> Tensor:
    """Return [rows, d_out] in `dtype`: codes [rows, d_in] int8 by their scales, times weight [d_out, d_in] int8 by
    `row_scale`, plus the bias; `tile` in place of what `tile_of` chooses."""
    (rows, d_in), d_out = codes.shape, weight.shape[0]
    out = torch.empty(rows, d_out, dtype=dtype, device=codes.device)
    if not rows:
        return out
    tile = tile or tile_of(rows, d_out)
    _matmul[(-(-rows // tile["BLOCK_M"]) * -(-d_out // tile["BLOCK_N"]),)](
        codes,
        weight,
        out,
        scales,
        row_scale,
        out if bias is None else bias,
        rows,
        d_out,
        d_in,
        out.stride(0),
        HAS_BIAS=bias is not None,
        **tile,
    )
    return out


def tile_of(rows: int, d_out: int) -> dict[str, int]:
    """Sizes of a tile and of its pipeline. Few rows: narrow tiles, so that every multiprocessor has weights to read.

    Chosen by counting bytes in flight, not by measurement: no card was at hand. `bench_cuda.py` prints each choice
    beside others.
    """
    if INTERPRETED:  # programs cost there, not memory
        return {"BLOCK_M": block(rows, most=64), "BLOCK_N": block(d_out, most=128), "BLOCK_K": 128, "TOGETHER": 8}
    if rows <= 64:
        narrow = 16 if d_out <= 4096 and rows <= 16 else 32
        size = {"BLOCK_M": block(rows, most=64), "BLOCK_N": narrow, "BLOCK_K": 256, "TOGETHER": 1}
        return size | {"num_warps": 4, "num_stages": 4}
    if rows <= 128:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "TOGETHER": 8, "num_warps": 4, "num_stages": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "TOGETHER": 8, "num_warps": 8, "num_stages": 3}
