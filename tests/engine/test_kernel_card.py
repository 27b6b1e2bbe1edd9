"""The card's kernels against float32 loops: in Triton's interpreter, and on the card where there is one."""

import itertools
import os
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from interpreted import DEVICE
from kernel_cases import NUM_SLOTS, assert_close, lora_batch, lora_site
from loractl.server.engine.kernels.attention import PagedBatch, paged_attention_reference
from loractl.server.engine.kernels.cuda.grouped_lora import add_lora_on_card
from loractl.server.engine.kernels.cuda.int8_matmul import int8_linear_on_card, quantize_rows_on_card
from loractl.server.engine.kernels.cuda.paged import paged_attention_on_card, write_kv_on_card
from loractl.server.engine.kernels.linear import int8_product, quantize_rows
from loractl.server.engine.kernels.lora import LoraBatch, LoraSite, RowChunks, add_lora_reference

LONG = os.environ.get("LORACTL_DRILLS") == "long"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANKS = [1, 5, 8, 16, 64, 128]
POPULARITIES = ["identical", "distinct", "uniform", "zipf", "skewed"]
PHASES = ["decode", "prefill", "mixed"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _check_lora(site: LoraSite, batch: LoraBatch, *, bias: Tensor | None = None) -> None:
    dtype, d_in, d_out = site.a.dtype, site.a.shape[2], site.b.shape[1]
    x = torch.randn(batch.num_rows, d_in).to(dtype)
    out = torch.randn(batch.num_rows, d_out).to(dtype)
    expected = out.float()
    add_lora_reference(expected, x.float(), site, batch, bias=bias)
    assert batch.chunks is not None
    there = _to_device(site)
    mine = out.to(DEVICE)
    bias = None if bias is None else bias.to(DEVICE)
    chunks = batch.chunks.to(DEVICE)
    add_lora_on_card(mine, x.to(DEVICE), there, chunks, bias=bias, with_gain=bool(site.gain_mask))
    assert_close(mine.cpu(), expected, dtype)
    bare = sorted(set(range(batch.num_rows)) - set(batch.rows.tolist()))
    assert torch.equal(mine.cpu()[bare], out[bare])


def _to_device(site: LoraSite) -> LoraSite:
    gain = None if site.gain is None else site.gain.to(DEVICE)
    return LoraSite(a=site.a.to(DEVICE), b=site.b.to(DEVICE), gain=gain, ranks=site.ranks, gain_mask=site.gain_mask)


@pytest.mark.drill
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_lora_equals_loop(dtype: torch.dtype, rank: int) -> None:
    turn = RANKS.index(rank) + DTYPES.index(dtype)
    popularities = POPULARITIES if LONG else [POPULARITIES[turn % len(POPULARITIES)]]
    # The interpreter pays for each block of ranks; the mixed rows hold both other kinds.
    phases = PHASES if LONG or rank < 64 else ["mixed"]
    wide = LONG or rank == 5  # more than one block of inputs and outputs
    site = lora_site(dtype, [rank], d_in=264 if wide else 100, d_out=264 if wide else 72)
    for popularity, phase in itertools.product(popularities, phases):
        _check_lora(site, lora_batch(popularity, phase, for_card=True))


@pytest.mark.parametrize("with_gain", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_lora_equals_loop_when_ranks_and_targets_differ(dtype: torch.dtype, with_gain: bool) -> None:
    site = lora_site(dtype, [1, 64, 0, 5, 8, 128, 16], d_in=64, d_out=40, with_gain=with_gain)
    _check_lora(site, lora_batch("distinct", "mixed", for_card=True), bias=torch.randn(40))


def test_wide_inputs_are_summed_in_parts_that_neighbours_do_not_change() -> None:
    site = lora_site(torch.float32, [8], d_in=4200, d_out=24)
    crowd = lora_batch("uniform", "decode", for_card=True)
    _check_lora(site, crowd)
    there, x = _to_device(site), torch.randn(crowd.num_rows, 4200, device=DEVICE)
    together = torch.zeros(crowd.num_rows, 24, device=DEVICE)
    assert crowd.chunks is not None
    add_lora_on_card(together, x, there, crowd.chunks.to(DEVICE), bias=None, with_gain=False)
    slot = int(crowd.slots[crowd.rows == 5])
    rows = torch.full((1, 16), -1, dtype=torch.int32)
    rows[0, 0] = 0
    alone = RowChunks(torch.tensor([slot], dtype=torch.int32), rows, torch.ones(1, 16), ((0, 1),)).to(DEVICE)
    out = torch.zeros(1, 24, device=DEVICE)
    add_lora_on_card(out, x[5:6], there, alone, bias=None, with_gain=False)
    assert torch.equal(out[0], together[5])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_quantized_as_the_cpu_does(dtype: torch.dtype) -> None:
    x = torch.randn(7, 200).to(dtype)
    x[3] = 0
    codes, scales = quantize_rows_on_card(x.to(DEVICE))
    expected, expected_scales = quantize_rows(x)
    assert torch.equal(codes.cpu(), expected)
    assert torch.equal(scales.cpu(), expected_scales)


@pytest.mark.parametrize(("rows", "d_in", "d_out"), [(1, 96, 40), (5, 200, 130), (70, 130, 72)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_linear_is_the_exact_sum_scaled(dtype: torch.dtype, rows: int, d_in: int, d_out: int) -> None:
    weight, scale = quantize_rows(torch.randn(d_out, d_in))
    bias = torch.randn(d_out) if rows > 1 else None
    codes, scales = quantize_rows(torch.randn(rows, d_in))
    expected = int8_product(codes, weight).float() * (scales[:, None] * scale)
    expected = expected if bias is None else expected + bias
    codes, scales, weight, scale = (one.to(DEVICE) for one in (codes, scales, weight, scale))
    there = None if bias is None else bias.to(DEVICE)
    out = int8_linear_on_card(codes, scales, weight, scale, there, dtype=dtype)
    torch.testing.assert_close(out.cpu(), expected.to(dtype), rtol=0 if dtype == torch.float32 else 1e-2, atol=1e-5)


def test_int8_linear_is_as_close_to_float32_as_bitsandbytes() -> None:
    from loractl.adapters.base_loading import quiet_libraries

    quiet_libraries()
    from bitsandbytes.nn import Linear8bitLt

    dense = torch.nn.Linear(256, 96)
    theirs: Any = Linear8bitLt(256, 96, has_fp16_weights=False, threshold=0.0)
    theirs.load_state_dict(dense.state_dict())
    theirs = theirs.to("cpu").eval()
    x = torch.randn(9, 256)
    with torch.inference_mode():
        exact, expected = dense(x), theirs(x.half()).float()
        codes, scales = quantize_rows_on_card(x.to(DEVICE))
        absmax = theirs.weight.SCB if theirs.weight.SCB is not None else theirs.state.SCB
        held = theirs.weight.CB if theirs.weight.CB is not None else theirs.weight.data
        there, scale, bias = held.to(DEVICE), (absmax.float() / 127).to(DEVICE), dense.bias.data.to(DEVICE)
        out = int8_linear_on_card(codes, scales, there, scale, bias, dtype=torch.float32).cpu()
    theirs_off, ours_off = (float((one - exact).norm() / exact.norm()) for one in (expected, out))
    assert ours_off <= 1.05 * theirs_off + 1e-4
    assert float((out - expected).norm() / expected.norm()) < 5e-3


def _paged(
    lengths: list[tuple[int, int]], *, block_size: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[PagedBatch, Tensor, Tensor, Tensor]:
    """Sequences of (new rows, length) over blocks in random order; what no sequence wrote is not a number."""
    needed = [-(-length // block_size) for _, length in lengths]
    order = list(range(sum(needed) + 2))
    random.Random(0).shuffle(order)
    tables = [[order.pop() for _ in range(count)] for count in needed]
    sequences = [(new, length, table) for (new, length), table in zip(lengths, tables, strict=True)]
    batch = PagedBatch.build(sequences, block_size=block_size, for_card=True)
    shape = (sum(needed) + 2, block_size, kv_heads, dim)
    caches = torch.full((2, *shape), float("nan"), dtype=dtype)
    for (_, length), table in zip(lengths, tables, strict=True):
        for token in range(length):
            caches[:, table[token // block_size], token % block_size] = torch.randn(2, kv_heads, dim).to(dtype)
    return batch, caches[0], caches[1], torch.randn(batch.places.shape[0], heads, dim).to(dtype)


def _on(batch: PagedBatch) -> PagedBatch:
    import dataclasses

    names = [f.name for f in dataclasses.fields(batch) if isinstance(getattr(batch, f.name), Tensor)]
    return dataclasses.replace(batch, **{name: getattr(batch, name).to(DEVICE) for name in names})


ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 21},
    "capped": {"softcap": 5.0},
    "sinks": {"sinks": True},
}
SHAPES = [(4, 4, 24), (6, 2, 32)]
MIXES = {
    "decode": [(1, 1), (1, 33), (1, 90)],
    "prefill": [(20, 20), (7, 50)],
    "mixed": [(1, 40), (1, 2), (18, 35), (1, 9)],
}


@pytest.mark.drill
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("options", ATTENTIONS)
def test_attention_equals_loop(mix: str, options: str) -> None:
    turn = list(MIXES).index(mix) + list(ATTENTIONS).index(options)
    for heads, kv_heads, dim in SHAPES if LONG else [SHAPES[turn % 2]]:
        _check_attention(MIXES[mix], ATTENTIONS[options], heads, kv_heads, dim, DTYPES[(turn + dim) % 3])


def _check_attention(
    mix: list[tuple[int, int]], options: dict[str, Any], heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    batch, k, v, q = _paged(mix, block_size=8, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    chosen = dict(options)
    if "sinks" in chosen:
        chosen["sinks"] = torch.randn(heads)
    expected = paged_attention_reference(q.float(), k.float(), v.float(), batch, scale=0.2, **chosen)
    if "sinks" in chosen:
        chosen["sinks"] = chosen["sinks"].to(DEVICE)
    out = paged_attention_on_card(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), _on(batch), scale=0.2, **chosen)
    assert_close(out.cpu(), expected, dtype)


def test_rows_that_fill_a_batch_up_come_out_as_zeros() -> None:
    batch, k, v, q = _paged([(1, 9), (1, 1)], block_size=8, heads=2, kv_heads=2, dim=16, dtype=torch.float32)
    batch.lengths[1] = 0
    out = paged_attention_on_card(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), _on(batch), scale=0.2)
    assert out[0].isfinite().all()
    assert not out[1].any()


def test_keys_and_values_reach_their_places() -> None:
    batch, k, v, _ = _paged(MIXES["mixed"], block_size=8, heads=2, kv_heads=2, dim=16, dtype=torch.bfloat16)
    rows = batch.places.shape[0]
    new = torch.randn(2, 2, rows, 16).bfloat16().transpose(1, 2)  # heads first in memory, as transformers gives them
    expected = [k.clone(), v.clone()]
    for cache, value in zip(expected, new, strict=True):
        cache.view(-1, 2, 16)[batch.places] = value
    caches = k.to(DEVICE), v.to(DEVICE)
    write_kv_on_card(new[0].to(DEVICE), new[1].to(DEVICE), *caches, _on(batch))
    for cache, should in zip(caches, expected, strict=True):
        torch.testing.assert_close(cache.cpu(), should, equal_nan=True, rtol=0, atol=0)


def test_every_slot_of_the_cases_is_used() -> None:
    assert {int(slot) for slot in lora_batch("distinct", "decode").slots} == set(range(NUM_SLOTS))
