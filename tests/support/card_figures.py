"""Figures of our own engine on a card, each a ratio of two numbers of one run."""

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from card_bench import Bench, Uses, copy_bytes_per_s, decode_rate, figure, median_burst
from card_checks import one_at_a_time, without_graphs
from loractl.adapters.base_loading import memory_bytes
from loractl.adapters.reference import Digest
from loractl.server.engine.engine import Engine
from loractl.server.engine.measure import burst
from loractl.server.engine.messages import AdapterUse


def int8_engine(bench: Bench) -> Iterator[dict[str, Any]]:
    """The figures of one engine on the int8 base, with all its slots."""
    model = bench.model(bench.llama, "int8")
    read_bytes = memory_bytes(model)["linear"]  # the head included: a step reads each once
    engine = bench.engine(model, "int8", num_slots=bench.num_adapters)
    none: Uses = [()]
    one = bench.work(1)
    step_s = median_burst(bench, engine, none, one).decode_s or float("nan")
    copied = copy_bytes_per_s(bench)
    yield figure("decode, 1 request: bytes of weights a second / a copy's", read_bytes / step_s, copied, ">= 0.6")
    with without_graphs(engine):
        plain_s = median_burst(bench, engine, none, one).decode_s
    yield figure("decode, 1 request: recorded steps / plain", 1 / step_s, 1 / plain_s if plain_s else None, ">= 1.0")
    with one_at_a_time(engine):
        waited_s = median_burst(bench, engine, none, one).decode_s
    yield figure("the same: steps ahead / one at a time", 1 / step_s, 1 / waited_s if waited_s else None, ">= 1.0")
    uses = bench.uses(bench.llama, bench.num_adapters)
    names = {"none": none, "distinct": uses, "identical": uses[:1]}
    work = bench.work()
    rates = {name: decode_rate(engine, some, work, bench) for name, some in names.items()}
    what = f"{work.num_requests} requests, {len(uses)} adapters of rank {bench.rank}"
    yield figure(f"{what}: decode, distinct / none, tokens/s", rates["distinct"], rates["none"], ">= 0.92")
    yield figure("the same: distinct / identical", rates["distinct"], rates["identical"], ">= 0.97")
    whole = {name: round(median_burst(bench, engine, names[name], work).rate, 1) for name in ("none", "distinct")}
    yield figure("the same, prompts included: distinct / none", whole["distinct"], whole["none"], ">= 0.92")
    yield from cold(bench, engine, uses)
    engine.close()


def cold(bench: Bench, engine: Engine, uses: Uses) -> Iterator[dict[str, Any]]:
    """First token of a lone request whose adapter is on the host only, and of one whose adapter is resident."""
    extra = bench.uses(bench.llama, bench.num_adapters + 1)
    work = bench.work(1, output_tokens=2)
    first: dict[str, list[float]] = {"cold": [], "warm": []}
    for round_number in range(2 * bench.num_runs + 2):
        # One adapter more than slots: the others fill them all, and it is left on the host.
        use = extra[-1]
        burst(engine, uses, bench.work(len(uses), is_short=True, output_tokens=2))
        for name in ("cold", "warm"):
            found = min(burst(engine, [use], work).first_token_s.values())
            if round_number >= 2:
                first[name].append(found)
    cold_s, warm_s = (statistics.median(first[name]) for name in ("cold", "warm"))
    yield figure("first token, adapter on the host / resident, s", cold_s, warm_s, "<= 1.1")


def registered(bench: Bench) -> Iterator[dict[str, Any]]:
    """Adapters under Zipf's law through few slots, against room for all that the traffic touches."""
    draw = random.Random(0)
    count, num_requests = bench.num_registered, 4 * bench.num_requests
    files = bench.uses(bench.llama, 4, rank=8, leaves=("q_proj", "v_proj"))
    chosen = draw.choices(range(count), [1 / (place + 1) for place in range(count)], k=num_requests)
    uses = [
        (AdapterUse(digest=Digest(f"sha256:{index:064x}"), folder=files[index % len(files)][0].folder),)
        for index in chosen
    ]
    rates = {}
    for num_slots in (bench.num_requests, len(set(chosen))):
        model = bench.model(bench.llama, "int8")
        engine = bench.engine(model, "int8", num_slots=num_slots, rank=8)
        found = median_burst(bench, engine, uses, bench.work(num_requests, is_short=True))
        rates[num_slots] = round(found.rate, 1)
        engine.close()
        del model, engine
        bench.free()
    few, all_of_them = rates.values()
    note = f"{len(set(chosen))} of {count} registered adapters touched"
    yield figure(f"Zipf(1.0), {bench.num_requests} slots / all resident, tokens/s", few, all_of_them, ">= 0.9", note)


def packed_shape(bench: Bench) -> Iterator[dict[str, Any]]:
    """The layout whose adapters reach queries, keys and values as one layer."""
    engine = bench.engine(bench.model(bench.packed, "int8"), "int8", num_slots=bench.num_adapters)
    uses = bench.uses(bench.packed, bench.num_adapters)
    work = bench.work(is_short=True)
    none, distinct = (decode_rate(engine, some, work, bench) for some in ([()], uses))
    engine.close()
    yield figure(f"{bench.packed.name}: decode, distinct / none, tokens/s", distinct, none, ">= 0.92")


def tiles(bench: Bench) -> Iterator[dict[str, Any]]:
    """The int8 product's tile that we choose beside others, so that a better choice is seen where a card is."""
    if not bench.is_card:
        return
    from loractl.server.engine.kernels.cuda.int8_matmul import int8_linear_on_card, tile_of

    wide, narrow = bench.llama.intermediate_size, bench.llama.hidden_size
    for d_in, d_out in ((narrow, narrow), (narrow, wide), (wide, narrow)):
        weights = [torch.randint(-127, 128, (d_out, d_in), dtype=torch.int8, device=bench.device) for _ in range(8)]
        scale = torch.full((d_out,), 1e-4, device=bench.device)
        for rows in (1, 64, 1024):
            codes = torch.randint(-127, 128, (rows, d_in), dtype=torch.int8, device=bench.device)
            scales = torch.full((rows,), 1e-2, device=bench.device)
            ours = tile_of(rows, d_out)
            changes: list[dict[str, int]] = [
                {},
                {"BLOCK_N": 2 * ours["BLOCK_N"]},
                {"num_stages": ours["num_stages"] - 1},
            ]
            changes += [{"BLOCK_K": ours["BLOCK_K"] // 2}, {"num_warps": 8 if ours["num_warps"] == 4 else 4}]
            for change in changes:
                call = partial(int8_linear_on_card, codes, scales, bias=None, row_scale=scale, dtype=torch.bfloat16)
                run = partial(_each, [partial(call, weight=weight, tile=ours | change) for weight in weights])
                seconds = bench.seconds(run, repeat=10) / len(weights)
                speed = f"{d_out * d_in / seconds / 1e9:.0f} GB/s, {2 * rows * d_out * d_in / seconds / 1e12:.1f} TOP/s"
                yield {
                    "tile": f"{d_in} x {d_out}, {rows} rows, {change or 'ours'}",
                    "us": seconds * 1e6,
                    "speed": speed,
                }


def _each(calls: Sequence[Callable[[], Any]]) -> None:
    for call in calls:
        call()
