"""Is what the engine computes on this device right? Each check returns figures and whether they are as promised."""

import contextlib
import importlib.util
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from engine_drive import Drive
from loractl.adapters.base_loading import Dtype
from loractl.adapters.manifest import Quantization
from loractl.server.engine.base_model import load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.measure import uses_of
from loractl.server.engine.messages import AdapterUse, RequestId, Sampling, Submit
from loractl.server.engine.settings import EngineSettings
from tiny_models import make_adapter, make_tiny_base

Outcome = dict[str, Any]
_SETTINGS = EngineSettings(
    num_slots=8, max_rank=16, max_batch_tokens=256, max_running=64, kv_bytes=1 << 26, run_ahead=True
)


def run_checks(
    folder: Path, *, device: torch.device, num_requests: int, real: tuple[Path, Path] | None
) -> Iterator[Outcome]:
    """Yield one outcome a check; `real`: a base and an adapter of it to be compared with PEFT besides the tiny one."""
    base = make_tiny_base(folder / "tiny-base", hidden_size=64, intermediate_size=96)
    kinds: list[dict[str, Any]] = [{"r": rank, "target_modules": "all-linear", "std": 0.1} for rank in (1, 5, 8, 16)]
    adapters = [make_adapter(base, folder / f"tiny-{index}", seed=index, **kind) for index, kind in enumerate(kinds)]
    dtype: Dtype = "float16" if device.type == "cuda" else "float32"
    yield _against_peft("tiny", base, adapters[1], device=device, dtype=dtype)
    if real is not None:
        yield _against_peft("real", *real, device=device, dtype=dtype)
    engines = {kind: _engine(base, kind, "auto") for kind in ("none", "int8")}
    for kind, engine in engines.items():
        yield _neighbours(f"neighbours, {kind}", engine, uses_of(adapters))
    yield _graphs(engines["int8"], uses_of(adapters))
    yield _ahead(engines["int8"], uses_of(adapters))
    yield _many(engines["int8"], uses_of(adapters), num_requests)
    for engine in engines.values():
        engine.close()
    if device.type == "cuda" and importlib.util.find_spec("pytest") is not None:
        yield _kernel_tests()


def _engine(base: Path, quantization: Quantization, dtype: Dtype) -> Engine:
    return Engine(load_base(base, quantization=quantization, dtype=dtype), _SETTINGS)


def _submit(name: str, prompt: tuple[int, ...], use: tuple[AdapterUse, ...], num_tokens: int, **asked: Any) -> Submit:
    given = {"max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True, "num_logprobs": 0} | asked
    sampling = Sampling(**given)
    return Submit(id=RequestId(name), prompt=prompt, adapters=use, sampling=sampling)


def _answers(engine: Engine, submits: list[Submit]) -> dict[str, tuple[list[int], list[float]]]:
    drive = Drive(engine)
    drive.submit(submits)
    drive.until_ended(timeout_s=600)
    return {
        name: (outcome.ids, [token.logprob or 0.0 for token in outcome.tokens])
        for name, outcome in drive.outcomes.items()
    }


def _against_peft(name: str, base: Path, adapter: Path, *, device: torch.device, dtype: Dtype) -> Outcome:
    """Greedy tokens and their log probabilities beside PEFT's, unquantized; tokens that PEFT's second could as well
    have been do not count."""
    num_tokens, prompt = 16, tuple(range(5, 29))
    engine = _engine(base, "none", dtype)
    ids, logprobs = _answers(engine, [_submit("one", prompt, uses_of([adapter])[0], num_tokens)])["one"]
    engine.close()
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype), attn_implementation="eager")
    model = PeftModel.from_pretrained(model.to(device), str(adapter)).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *ids[:-1]]], device=device)).logits[0, len(prompt) - 1 :]
    scores = torch.log_softmax(logits.float(), -1).cpu()
    gaps = (scores[range(num_tokens), ids] - torch.tensor(logprobs)).abs()
    top = scores.topk(2).values
    tolerance = 0.02 if dtype != "float32" else 1e-3
    wrong = [
        at for at in range(num_tokens) if ids[at] != int(scores[at].argmax()) and top[at, 0] - top[at, 1] > tolerance
    ]
    is_right = not wrong and float(gaps.max()) <= tolerance
    return {"check": f"{name} base and adapter against PEFT, {dtype}", "ok": is_right, "largest_gap": float(gaps.max())}


def _neighbours(name: str, engine: Engine, uses: Any) -> Outcome:
    prompt = tuple(range(40, 60))
    alone = _answers(engine, [_submit("alone", prompt, uses[3], 12)])["alone"]
    crowd = [_submit(f"n{index}", (7 + index, 9), uses[index % 4], 14) for index in range(12)]
    beside = _answers(engine, [*crowd, _submit("beside", prompt, uses[3], 12)])["beside"]
    gap = max(abs(a - b) for a, b in zip(alone[1], beside[1], strict=True))
    return {"check": name, "ok": alone[0] == beside[0] and gap < 0.02, "largest_gap": gap}


@contextlib.contextmanager
def without_graphs(engine: Engine) -> Iterator[None]:
    """Let every step run unrecorded."""
    runner: Any = engine._runner
    kept, runner._graphs = runner._graphs, None
    try:
        yield
    finally:
        runner._graphs = kept


def _graphs(engine: Engine, uses: Any) -> Outcome:
    submits = [
        _submit(f"g{index}", (20 + index, 4, 9), uses[index % 4] if index % 3 else (), 10) for index in range(11)
    ]
    before = engine._runner.num_replays
    recorded = _answers(engine, submits)
    num_replays = engine._runner.num_replays - before
    with without_graphs(engine):
        plain = _answers(engine, submits)
    gap = max(abs(a - b) for name in plain for a, b in zip(plain[name][1], recorded[name][1], strict=True))
    same = all(plain[name][0] == recorded[name][0] for name in plain)
    return {
        "check": "recorded steps against plain ones",
        "ok": same and gap < 0.02,
        "largest_gap": gap,
        "replays": num_replays,
    }


@contextlib.contextmanager
def one_at_a_time(engine: Engine) -> Iterator[None]:
    """Let no step be launched before the tokens of the one before are read."""
    ahead: Any = engine._ahead
    kept, ahead._is_on = ahead._is_on, False
    try:
        yield
    finally:
        ahead._is_on = kept


def _ahead(engine: Engine, uses: Any) -> Outcome:
    """Drawn and likeliest tokens of rows that end at different steps; only rows without log probabilities fly."""
    submits = [
        _submit(
            f"f{index}",
            (20 + index, 4, 9),
            uses[index % 4] if index % 3 else (),
            6 + index,
            num_logprobs=None,
            temperature=float(index % 2),
            seed=index,
            top_p=0.9 if index % 4 == 1 else 1.0,
        )
        for index in range(11)
    ]
    before = engine._ahead.num_ahead
    flown = _answers(engine, submits)
    num_ahead = engine._ahead.num_ahead - before
    with one_at_a_time(engine):
        read = _answers(engine, submits)
    return {
        "check": "steps ahead against one at a time",
        "ok": num_ahead > 0 and all(flown[name][0] == read[name][0] for name in read),
        "ahead": num_ahead,
    }


def _many(engine: Engine, uses: Any, num_requests: int) -> Outcome:
    """Many requests through few slots: each answers as the first of its prompt and adapter did, and the books agree."""
    draw = random.Random(0)
    sixteen = [
        (AdapterUse(digest=f"sha256:{index:064x}", folder=uses[index % 4][0].folder),)  # type: ignore[arg-type]
        for index in range(16)
    ]
    plans = [(draw.randrange(16), draw.randrange(3)) for _ in range(num_requests)]
    prompts = [(5, 9, 40), tuple(range(50, 90)), (300,)]
    first: dict[tuple[int, int], list[int]] = {}
    num_different = 0
    for start in range(0, num_requests, 500):
        part = list(enumerate(plans[start : start + 500], start))
        found = _answers(
            engine,
            [_submit(f"m{at}", prompts[which], sixteen[who], 3, num_logprobs=None) for at, (who, which) in part],
        )
        for at, (who, which) in part:
            num_different += found[f"m{at}"][0] != first.setdefault((who % 4, which), found[f"m{at}"][0])
    name = f"{num_requests} requests, 16 adapters, {engine.size.num_slots} slots"
    evictions = engine.stats().counters.num_adapter_evictions
    return {"check": name, "ok": num_different == 0, "different": num_different, "evictions": evictions}


def _kernel_tests() -> Outcome:
    tests = Path(__file__).parent.parent / "engine" / "test_kernel_card.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), "-k", "not bitsandbytes"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    return {"check": "kernels against loops", "ok": done.returncode == 0, "said": done.stdout.strip().splitlines()[-1:]}
