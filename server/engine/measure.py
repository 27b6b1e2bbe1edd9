"""Measures the engine alone: bursts of the same work, and the ratios between them. Knows no HTTP and prints nothing."""

import dataclasses
import itertools
import random
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from loractl.adapters.digest import folder_digest
from loractl.adapters.reference import Digest
from loractl.server.engine.base_model import BaseModel, load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.kernels.linear import Int8Linear, int8_product, quantize_rows
from loractl.server.engine.messages import AdapterUse, Failed, RequestId, Sampling, Submit, Token
from loractl.server.engine.settings import EngineSettings

Uses = Sequence[tuple[AdapterUse, ...]]
_BASE: Uses = [()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a burst asks for: requests at once, each of random tokens and with all its answer's tokens."""

    num_requests: int
    num_prompt_tokens: int = 64
    num_output_tokens: int = 64


@dataclass(frozen=True, slots=True)
class Burst:
    """What came of it. Steps that computed nothing are left out."""

    seconds: float
    num_tokens: int
    first_token_s: Mapping[RequestId, float]
    steps_s: Sequence[float]
    decode_s: float | None
    """Median step of all requests decoding."""

    @property
    def rate(self) -> float:
        return self.num_tokens / self.seconds


_seeds = itertools.count()


def uses_of(folders: Sequence[Path]) -> Uses:
    """One request's adapters for each folder; the bare base for none."""
    return [(AdapterUse(digest=folder_digest(folder), folder=folder),) for folder in folders] or _BASE


def burst(engine: Engine, uses: Uses, work: Work, *, later: Sequence[AdapterUse] = ()) -> Burst:
    """Send all requests at once and step until the last has ended; `later` is one more request, sent after a quarter of
    the steps."""
    seed = next(_seeds)
    tokens = random.Random(seed)  # noqa: S311 - prompts to measure with, no secret

    def ask(name: str, adapters: tuple[AdapterUse, ...]) -> RequestId:
        prompt = tuple(tokens.randrange(engine.base.vocab_size) for _ in range(work.num_prompt_tokens))
        sampling = Sampling(max_tokens=work.num_output_tokens, temperature=0.0, ignore_eos=True)
        request_id = RequestId(f"{seed}-{name}")
        asked[request_id] = time.perf_counter()
        engine.submit(Submit(id=request_id, prompt=prompt, sampling=sampling, adapters=adapters))
        return request_id

    asked: dict[RequestId, float] = {}
    first: dict[RequestId, float] = {}
    steps: list[float] = []
    decodes: list[float] = []
    started = time.perf_counter()
    for number in range(work.num_requests):
        ask(str(number), uses[number % len(uses)])
    num_open, num_tokens, is_late_due = work.num_requests, 0, bool(later)
    while num_open:
        if is_late_due and len(steps) >= work.num_output_tokens // 4:
            ask("late", tuple(later))
            num_open, is_late_due = num_open + 1, False
        result = engine.step()
        now = time.perf_counter()
        for event in result.events:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Token):
                num_tokens += 1
                first.setdefault(event.id, now - asked[event.id])
            else:
                num_open -= 1
        if result.record is not None:
            steps.append(result.record.seconds)
            if result.record.num_tokens == result.record.num_requests == work.num_requests:
                decodes.append(result.record.seconds)
    seconds = time.perf_counter() - started
    return Burst(seconds, num_tokens, first, steps, statistics.median(decodes) if decodes else None)


def medians(scenarios: Mapping[str, tuple[Engine, Uses, Work]], *, num_runs: int) -> dict[str, float]:
    """Tokens per second of each scenario, taken in turns so that the machine's moods reach all alike."""
    rates: dict[str, list[float]] = {name: [] for name in scenarios}
    for engine, uses, work in scenarios.values():
        burst(engine, uses, dataclasses.replace(work, num_output_tokens=2))
    for _ in range(num_runs):
        for name, (engine, uses, work) in scenarios.items():
            rates[name].append(burst(engine, uses, work).rate)
    return {name: round(statistics.median(values), 1) for name, values in rates.items()}


def products_s(engine: Engine, num_rows: int, *, compiled: bool) -> float:
    """Seconds of the int8 products of one step over every linear layer and the head.

    By torch's `_int_mm`, bare of scales and of quantizing the rows, or by the layers' own compiled product with both.
    """
    layers = [module for module in engine.base.model.modules() if isinstance(module, Int8Linear)]
    rows = {width: torch.randn(num_rows, width, dtype=torch.bfloat16) for width in {one.in_features for one in layers}}
    if compiled:
        products = [partial(layer, rows[layer.in_features]) for layer in layers]
    else:
        codes = {width: quantize_rows(of_width)[0] for width, of_width in rows.items()}
        products = [partial(int8_product, codes[layer.in_features], layer.codes()) for layer in layers]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for product in products:
            product()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def make_engine(base: BaseModel, *, num_slots: int, max_rank: int, num_requests: int = 64) -> Engine:
    settings = EngineSettings(
        num_slots=num_slots,
        max_rank=max_rank,
        max_running=min(64, num_requests),
        max_queue=max(64, num_requests),
        prefix_cache=False,
        kv_bytes=1 << 29,
    )
    return Engine(base, settings)


def ratios(
    base_folder: Path, folders: Sequence[Path], *, max_rank: int, work: Work, num_runs: int, peers: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Yield every figure as it is measured: its name, the ratio, and the two numbers that it divides.

    `folders`: at least two adapters; half of them fill the slots. `peers`: commands that print one JSON line a
    measurement, with `requests`, `adapters` and `output_tokens_per_s`.
    """
    base = load_base(base_folder, quantization="int8")
    num_slots = max(1, len(folders) // 2)
    uses = uses_of(folders)
    ours: dict[tuple[int, int], float] = {}
    engine = make_engine(base, num_slots=num_slots, max_rank=max_rank, num_requests=work.num_requests)
    yield from _mixing(engine, uses[:num_slots], work, num_runs, ours)
    yield from _steps(engine, work, num_runs)
    yield from _cold(engine, uses[:num_slots], work, num_runs)
    yield from _working_sets(engine, uses, num_slots, work, num_runs)
    yield _unused(engine, base_folder, work, num_runs)
    engine.close()
    yield from _dense(base_folder, work, num_runs, ours)
    yield from _peers(peers, ours)


def _mixing(
    engine: Engine, uses: Uses, work: Work, num_runs: int, ours: dict[tuple[int, int], float]
) -> Iterator[dict[str, Any]]:
    few = dataclasses.replace(work, num_requests=min(16, work.num_requests))
    one = dataclasses.replace(work, num_requests=1)
    plan: dict[str, tuple[Engine, Uses, Work]] = {
        "one": (engine, _BASE, one),
        "one+1": (engine, uses[:1], one),
        "few": (engine, _BASE, few),
        "few+": (engine, uses[: few.num_requests], few),
        "base": (engine, _BASE, work),
        "distinct": (engine, uses, work),
        "identical": (engine, uses[:1], work),
    }
    rates = medians(plan, num_runs=num_runs)
    for name, (_, adapters, each) in plan.items():
        if name != "identical":
            ours[each.num_requests, 0 if adapters is _BASE else len(adapters)] = rates[name]
    yield _figure(f"{few.num_requests} requests, as many adapters / none", rates["few+"], rates["few"])
    yield _figure(f"{work.num_requests} requests, {len(uses)} adapters / none", rates["distinct"], rates["base"])
    yield _figure(f"{len(uses)} distinct / identical", rates["distinct"], rates["identical"])


def _steps(engine: Engine, work: Work, num_runs: int) -> Iterator[dict[str, Any]]:
    found = [burst(engine, _BASE, work).decode_s for _ in range(num_runs)]
    step_s = statistics.median(value for value in found if value is not None)
    for name, compiled in (("bare products", False), ("products in the layers", True)):
        floor_s = products_s(engine, work.num_requests, compiled=compiled)
        yield _figure(f"step / {name}, ms", round(step_s * 1e3, 2), round(floor_s * 1e3, 2))


def _cold(engine: Engine, uses: Uses, work: Work, num_runs: int) -> Iterator[dict[str, Any]]:
    """A request that comes while others decode: its first token and the longest step, its adapter away or there."""
    beside = dataclasses.replace(work, num_requests=min(16, max(1, work.num_requests - 1)))
    late = uses[-1]
    first: dict[bool, list[float]] = {True: [], False: []}
    longest: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(num_runs):
        for is_cold in (False, True):
            if is_cold:
                for use in late:
                    engine.unload(use.digest)
                engine.step()
            result = burst(engine, _BASE, beside, later=late)
            late_id = next(name for name in result.first_token_s if name.endswith("late"))
            first[is_cold].append(result.first_token_s[late_id])
            longest[is_cold].append(max(result.steps_s[2:]))  # the first ones hold the neighbours' own prompts
    cold, warm = (round(statistics.median(first[is_cold]) * 1e3, 1) for is_cold in (True, False))
    yield _figure("first token, adapter on disk / resident, ms", cold, warm)
    cold, warm = (round(statistics.median(longest[is_cold]) * 1e3, 1) for is_cold in (True, False))
    yield _figure("longest step of the neighbours, adapter on disk / resident, ms", cold, warm)


def _working_sets(engine: Engine, uses: Uses, num_slots: int, work: Work, num_runs: int) -> Iterator[dict[str, Any]]:
    rates = medians({"fits": (engine, uses[:num_slots], work), "twice": (engine, uses, work)}, num_runs=num_runs)
    yield _figure("working set of 2 x slots / = slots", rates["twice"], rates["fits"])
    registered = {str(count): (engine, _zipf(uses, count, work.num_requests), work) for count in (10, 1000)}
    rates = medians(registered, num_runs=num_runs)
    yield _figure("1,000 registered under Zipf(1.0) / 10", rates["1000"], rates["10"])


def _zipf(uses: Uses, count: int, num_requests: int) -> Uses:
    """Adapters of `num_requests` requests out of `count`, each under a digest of its own; files are shared."""
    draw = random.Random(0)  # noqa: S311 - a popularity to measure with
    chosen = draw.choices(range(count), [1 / (rank + 1) for rank in range(count)], k=num_requests)
    return [
        (AdapterUse(digest=Digest(f"sha256:{index:064x}"), folder=uses[index % len(uses)][0].folder),)
        for index in chosen
    ]


def _unused(engine: Engine, base_folder: Path, work: Work, num_runs: int) -> dict[str, Any]:
    """Traffic without adapters beside full slots, and on an engine that has room for none, in turns."""
    base = load_base(base_folder, quantization="int8")  # its own: an engine makes the layers of its base its own
    bare = make_engine(base, num_slots=1, max_rank=1, num_requests=work.num_requests)
    rates = medians({"full": (engine, _BASE, work), "bare": (bare, _BASE, work)}, num_runs=num_runs)
    bare.close()
    return _figure("base traffic, slots full and unused / no room for adapters", rates["full"], rates["bare"])


def _dense(
    base_folder: Path, work: Work, num_runs: int, ours: dict[tuple[int, int], float]
) -> Iterator[dict[str, Any]]:
    engine = make_engine(
        load_base(base_folder, quantization="none"), num_slots=1, max_rank=1, num_requests=work.num_requests
    )
    few = dataclasses.replace(work, num_requests=min(16, work.num_requests))
    rates = medians({"few": (engine, _BASE, few), "all": (engine, _BASE, work)}, num_runs=num_runs)
    engine.close()
    yield _figure(f"int8 / dense, {few.num_requests} requests", ours[few.num_requests, 0], rates["few"])
    yield _figure(f"int8 / dense, {work.num_requests} requests", ours[work.num_requests, 0], rates["all"])


def _peers(peers: Mapping[str, str], ours: dict[tuple[int, int], float]) -> Iterator[dict[str, Any]]:
    for name, command in peers.items():
        done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=True, timeout=1800)
        rates: dict[tuple[int, int], list[float]] = {}
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                found = msgspec.json.decode(line, type=dict[str, Any])
                rates.setdefault((found["requests"], found["adapters"]), []).append(found["output_tokens_per_s"])
        for (num_requests, num_adapters), values in rates.items():
            if (mine := ours.get((num_requests, num_adapters))) is not None:
                label = f"ours / {name}, {num_requests} requests, {num_adapters} adapters"
                yield _figure(label, mine, round(statistics.median(values), 1))


def _figure(name: str, ours: float, other: float) -> dict[str, Any]:
    return {"figure": name, "ratio": round(ours / other, 3) if other else None, "ours": ours, "other": other}
