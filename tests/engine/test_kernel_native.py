"""The compiled kernels against the float32 loops and plain torch: every dtype, rank, popularity and mix of rows."""

import pytest
import torch

from kernel_cases import assert_close, lora_batch, lora_site
from loractl.server.engine.kernels import native
from loractl.server.engine.kernels.attention import (
    PagedBatch,
    paged_attention,
    paged_attention_reference,
    paged_attention_torch,
    write_kv,
)
from loractl.server.engine.kernels.linear import Int8Linear, quantize_rows
from loractl.server.engine.kernels.lora import LoraBatch, LoraSpan, LoraStep, add_lora, add_lora_reference

DTYPES = [torch.float32, torch.bfloat16]
RANKS = [1, 5, 8, 16, 64, 128]


@pytest.fixture
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.usefixtures("_seeded")
@pytest.mark.parametrize("phase", ["decode", "prefill", "mixed"])
@pytest.mark.parametrize("popularity", ["identical", "distinct", "uniform", "zipf", "skewed"])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_linear_equals_loop_when_rows_have_adapters(
    dtype: torch.dtype, rank: int, popularity: str, phase: str
) -> None:
    batch = lora_batch(popularity, phase)
    step = LoraStep(batch)
    layer = Int8Linear.from_dense(torch.randn(72, 100), torch.randn(72), step=step)
    layer.site = lora_site(dtype, [rank], d_in=100, d_out=72)
    x = torch.randn(batch.num_rows, 100).to(dtype)
    expected = layer.base(x.float())
    add_lora_reference(expected, x.float(), layer.site, batch)
    assert_close(layer(x), expected, dtype)


@pytest.mark.usefixtures("_seeded")
@pytest.mark.parametrize("with_gain", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_linear_equals_loop_when_ranks_and_targets_differ(dtype: torch.dtype, with_gain: bool) -> None:
    batch = lora_batch("distinct", "mixed")
    layer = Int8Linear.from_dense(torch.randn(40, 64), torch.randn(40), step=LoraStep(batch))
    layer.site = lora_site(dtype, [1, 64, 0, 5, 8, 128, 16], d_in=64, d_out=40, with_gain=with_gain)
    x = torch.randn(batch.num_rows, 64).to(dtype)
    expected = layer.base(x.float())
    add_lora_reference(expected, x.float(), layer.site, batch, bias=layer.bias)
    assert_close(layer(x), expected, dtype)


@pytest.mark.usefixtures("_seeded")
@pytest.mark.parametrize("popularity", ["identical", "distinct", "zipf"])
def test_torch_lora_equals_loop_when_weights_are_summed(popularity: str) -> None:
    batch = lora_batch(popularity, "mixed")
    site = lora_site(torch.float32, [1, 5, 8, 64], d_in=33, d_out=20, with_gain=True)
    x, out, bias = torch.randn(batch.num_rows, 33), torch.randn(batch.num_rows, 20), torch.randn(20)
    expected = out.clone()
    add_lora(out, x, site, batch, bias=bias)
    add_lora_reference(expected, x, site, batch, bias=bias)
    assert_close(out, expected, torch.float32)


@pytest.mark.usefixtures("_seeded")
@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 64, 130])
@pytest.mark.parametrize(("d_in", "d_out"), [(576, 192), (70, 100), (4, 1), (1536, 33)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_linear_is_bit_equal_to_torch_when_no_adapter(
    dtype: torch.dtype, rows: int, d_in: int, d_out: int
) -> None:
    layer = Int8Linear.from_dense(torch.randn(d_out, d_in), torch.randn(d_out), step=LoraStep())
    x = torch.randn(rows, d_in).to(dtype)
    x[0] = 0
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.usefixtures("_seeded")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_int8_linear_keeps_bad_numbers_in_their_row(value: float) -> None:
    layer = Int8Linear.from_dense(torch.randn(40, 64), None, step=LoraStep())
    x = torch.randn(5, 64)
    good = layer(x)
    x[2, 7] = value
    bad = layer(x)
    assert not bad[2].isfinite().any()
    assert torch.equal(bad[[0, 1, 3, 4]], good[[0, 1, 3, 4]])


@pytest.mark.usefixtures("_seeded")
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_linear_row_is_bit_equal_when_neighbours_change(dtype: torch.dtype) -> None:
    if native.library() is None:
        pytest.skip("plain torch promises a bound, not bits")
    batch = lora_batch("uniform", "mixed")
    step = LoraStep(batch)
    layer = Int8Linear.from_dense(torch.randn(72, 100), None, step=step)
    layer.site = lora_site(dtype, [8, 64], d_in=100, d_out=72)
    x = torch.randn(batch.num_rows, 100).to(dtype)
    together = layer(x)
    for row in range(0, batch.num_rows, 7):
        pairs = list(zip(batch.rows.tolist(), batch.slots.tolist(), batch.weights.tolist(), strict=True))
        alone = tuple((slot, weight) for owner, slot, weight in pairs if owner == row)
        step.batch = LoraBatch.build([LoraSpan(0, 1, alone)], num_rows=1)
        assert torch.equal(layer(x[row : row + 1]), together[row : row + 1])


def test_dense_weight_survives_packing() -> None:
    weight = torch.randn(50, 70)
    codes, scale = quantize_rows(weight)
    layer = Int8Linear.from_dense(weight, None, step=LoraStep())
    torch.testing.assert_close(layer.dense_weight(), codes.float() * scale[:, None])


SEQUENCES = [(1, 1, [9]), (1, 47, [3, 1, 5]), (20, 20, [2, 7]), (17, 60, [11, 12, 13, 14]), (1, 33, [4, 6, 8])]
LIMITS = [{}, {"window": 7}, {"softcap": 2.0}, {"window": 30, "softcap": 5.0, "sinks": True}]


@pytest.mark.usefixtures("_seeded")
@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 2, 8), (8, 1, 80), (2, 2, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_equals_loop_when_prefill_and_decode_mix(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, limits: dict[str, float]
) -> None:
    batch = PagedBatch.build(SEQUENCES, block_size=16)
    rows = len(batch.places)
    cache = torch.full((2, 16, 16, kv_heads, dim), float("nan"), dtype=dtype)  # unwritten places must not be seen
    for sequence, (_, _, length) in enumerate(batch.bounds):
        for token in range(length):
            place = int(batch.tables[sequence, token // 16]), token % 16
            cache[:, place[0], place[1]] = torch.randn(2, kv_heads, dim).to(dtype)
    k, v = torch.randn(2, kv_heads, rows, dim).to(dtype).transpose(1, 2)
    write_kv(k, v, cache[0], cache[1], batch)
    assert torch.equal(cache[0].view(-1, kv_heads, dim)[batch.places], k)
    q = torch.randn(heads, rows, dim).to(dtype).transpose(0, 1)
    window, softcap = limits.get("window"), limits.get("softcap")
    sinks = torch.randn(heads) if "sinks" in limits else None
    for run in (paged_attention, paged_attention_torch):
        out = run(
            q,
            cache[0],
            cache[1],
            batch,
            scale=dim**-0.5,
            window=None if window is None else int(window),
            softcap=softcap,
            sinks=sinks,
        )
        expected = paged_attention_reference(
            q,
            cache[0],
            cache[1],
            batch,
            scale=dim**-0.5,
            window=None if window is None else int(window),
            softcap=softcap,
            sinks=sinks,
        )
        assert_close(out, expected, dtype)


@pytest.mark.usefixtures("_seeded")
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_row_is_bit_equal_when_alone_or_chunked(dtype: torch.dtype) -> None:
    if native.library() is None:
        pytest.skip("plain torch promises a bound, not bits")
    batch = PagedBatch.build(SEQUENCES, block_size=16)
    cache = torch.randn(2, 16, 16, 3, 64).to(dtype)
    q = torch.randn(len(batch.places), 9, 64).to(dtype)
    together = paged_attention(q, cache[0], cache[1], batch, scale=0.125)
    for (start, end, length), (_, _, table) in zip(batch.bounds, SEQUENCES, strict=True):
        for row in range(start, end):
            alone = PagedBatch.build([(1, length - (end - row) + 1, table)], block_size=16)
            single = paged_attention(q[row : row + 1], cache[0], cache[1], alone, scale=0.125)
            assert torch.equal(single, together[row : row + 1])


def test_library_is_absent_when_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORACTL_NATIVE", "0")
    native.library.cache_clear()
    try:
        layer = Int8Linear.from_dense(torch.eye(8), None, step=LoraStep())
        assert native.library() is None
        torch.testing.assert_close(layer(torch.eye(8)), torch.eye(8))
    finally:
        native.library.cache_clear()
