"""Random slots and mixes of rows that every kernel with adapters is held to, whatever it runs on."""

from itertools import pairwise

import torch
from torch import Tensor

from loractl.server.engine.kernels.lora import LoraBatch, LoraSite, LoraSpan

NUM_SLOTS = 8
RELATIVE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
"""Of the largest number: float32 sums in another order; bfloat16 rounds its result to 8 bits, twice."""


def slots_of(popularity: str, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(count)
    shares = {
        "identical": [1.0] + [0.0] * (NUM_SLOTS - 1),
        "uniform": [1.0] * NUM_SLOTS,
        "zipf": [1 / (slot + 1) for slot in range(NUM_SLOTS)],
        "skewed": [20.0] + [1.0] * (NUM_SLOTS - 1),
    }
    if popularity == "distinct":
        return [index % NUM_SLOTS for index in range(count)]
    return torch.multinomial(torch.tensor(shares[popularity]), count, True, generator=generator).tolist()


def lora_spans(popularity: str, phase: str) -> list[LoraSpan]:
    """Runs of rows with slots: one run sums two adapters, another has none."""
    lengths = {"decode": [1] * 16, "prefill": [30, 7, 50], "mixed": [1] * 9 + [40, 3, 1]}[phase]
    slots = slots_of(popularity, len(lengths))
    edges = torch.tensor([0, *lengths]).cumsum(0).tolist()
    uses: list[tuple[tuple[int, float], ...]] = [((slot, 1.0),) for slot in slots]
    uses[0] = ((slots[0], 0.5), ((slots[0] + 1) % NUM_SLOTS, -0.25))
    if len(uses) > 4:
        uses[3] = ()
    return [LoraSpan(start, stop, use) for (start, stop), use in zip(pairwise(edges), uses, strict=True)]


def lora_batch(popularity: str, phase: str, *, for_card: bool = False) -> LoraBatch:
    spans = lora_spans(popularity, phase)
    batch = LoraBatch.build(spans, num_rows=spans[-1].stop, for_card=for_card)
    assert batch is not None
    return batch


def lora_site(dtype: torch.dtype, ranks: list[int], *, d_in: int, d_out: int, with_gain: bool = False) -> LoraSite:
    rank_max = max(ranks)
    numel = LoraSite.numel(d_in=d_in, d_out=d_out, rank_max=rank_max, with_gain=with_gain)
    slab = torch.full((NUM_SLOTS, numel + 64), float("nan"), dtype=dtype)  # padding that is read shows
    site = LoraSite.carve(slab, 32, d_in=d_in, d_out=d_out, rank_max=rank_max, with_gain=with_gain)
    for slot in range(NUM_SLOTS):
        rank = ranks[slot % len(ranks)]
        site.a[slot, :rank] = torch.randn(rank, d_in).to(dtype)
        site.b[slot, :, :rank] = torch.randn(d_out, rank).to(dtype)
        if site.gain is not None:
            site.gain[slot] = torch.randn(d_out).to(dtype)
        site.set_slot(slot, rank=rank, has_gain=with_gain and slot % 2 == 0)
    return site


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.isfinite().all()
    gap = (actual.float() - expected.float()).abs().max().item()
    assert gap <= RELATIVE[dtype] * expected.float().abs().max().item()
