"""Times the kernels beside what torch offers: microseconds per call as JSON lines. Run it alone on the machine."""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from loractl.server.engine.kernels.attention import PagedBatch, paged_attention, paged_attention_torch
from loractl.server.engine.kernels.linear import Int8Linear, int8_product, quantize_rows
from loractl.server.engine.kernels.lora import LoraBatch, LoraSite, LoraSpan, LoraStep

SHAPES = [(576, 960), (576, 576), (576, 3072), (1536, 576), (576, 49152), (4096, 11008)]
ROWS = [1, 4, 16, 64, 256]


def microseconds(call: Callable[[], Any], *, budget_s: float = 0.15) -> float:
    """The median time of a call, over at least five of them."""
    call()
    times: list[float] = []
    ends = time.perf_counter() + budget_s
    while len(times) < 5 or time.perf_counter() < ends:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times) * 1e6, 1)


def bench_linear(d_in: int, d_out: int) -> None:
    weight = torch.randn(d_out, d_in)
    codes, _ = quantize_rows(weight)
    narrow = weight.bfloat16()
    layer = Int8Linear.from_dense(weight, None, step=LoraStep())
    for rows in ROWS:
        x = torch.randn(rows, d_in).bfloat16()
        x_codes, _ = quantize_rows(x)
        bf16 = microseconds(partial(torch.nn.functional.linear, x, narrow))
        bare = microseconds(partial(int8_product, x_codes, codes))
        ours = microseconds(partial(layer, x))
        figures = {"bf16_us": bf16, "bare_int_mm_us": bare, "ours_us": ours}
        print(json.dumps({"kernel": "int8_linear", "d_in": d_in, "d_out": d_out, "rows": rows, **figures}))


def bench_lora(d_in: int, d_out: int, *, rank: int, num_slots: int = 32, rows: int = 64) -> None:
    step = LoraStep()
    layer = Int8Linear.from_dense(torch.randn(d_out, d_in), None, step=step)
    numel = LoraSite.numel(d_in=d_in, d_out=d_out, rank_max=rank, with_gain=False)
    slab = torch.randn(num_slots, numel).bfloat16()
    layer.site = LoraSite.carve(slab, 0, d_in=d_in, d_out=d_out, rank_max=rank)
    for slot in range(num_slots):
        layer.site.set_slot(slot, rank=rank)
    x = torch.randn(rows, d_in).bfloat16()
    figures = {"none_us": microseconds(lambda: layer(x))}
    for name, slots in {"identical": 1, "distinct": num_slots}.items():
        spans = [LoraSpan(row, row + 1, ((row % slots, 1.0),)) for row in range(rows)]
        step.batch = LoraBatch.build(spans, num_rows=rows)
        figures[f"{name}_us"] = microseconds(lambda: layer(x))
    print(json.dumps({"kernel": "lora", "d_in": d_in, "d_out": d_out, "rank": rank, "rows": rows, **figures}))


def bench_attention(sequences: int, length: int, *, new: int = 1, heads: int = 9, kv_heads: int = 3) -> None:
    blocks = -(-length // 16)
    tables = torch.randperm(sequences * blocks).view(sequences, blocks).tolist()
    batch = PagedBatch.build([(new, length, table) for table in tables], block_size=16)
    cache = torch.randn(2, sequences * blocks, 16, kv_heads, 64).bfloat16()
    q = torch.randn(sequences * new, heads, 64).bfloat16()
    ours = microseconds(lambda: paged_attention(q, cache[0], cache[1], batch, scale=0.125))
    plain = microseconds(lambda: paged_attention_torch(q, cache[0], cache[1], batch, scale=0.125))
    figures = {"ours_us": ours, "torch_us": plain}
    print(json.dumps({"kernel": "attention", "sequences": sequences, "new": new, "length": length, **figures}))


def main() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        for d_in, d_out in SHAPES:
            bench_linear(d_in, d_out)
        for d_in, d_out, rank in [(576, 576, 8), (576, 192, 8), (576, 3072, 16), (1536, 576, 16)]:
            bench_lora(d_in, d_out, rank=rank)
        for sequences, new, length in [(1, 1, 128), (16, 1, 128), (64, 1, 128), (8, 64, 64), (1, 512, 2048)]:
            bench_attention(sequences, length, new=new)


if __name__ == "__main__":
    main()
