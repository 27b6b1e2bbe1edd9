"""Measures the engine alone: the same work as other engines' benchmarks, so that figures can stand side by side."""

import itertools
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loractl.adapters.base_source import resolve_base
from loractl.adapters.digest import folder_digest
from loractl.adapters.manifest import Quantization
from loractl.server.engine.base_model import load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.messages import AdapterUse, Failed, Finished, RequestId, Sampling, Submit, Token
from loractl.server.engine.settings import EngineSettings


def measure(
    base: str,
    adapters: Sequence[Path],
    *,
    num_requests: int,
    num_prompt_tokens: int,
    num_output_tokens: int,
    quantization: Quantization,
    num_runs: int,
) -> dict[str, Any]:
    """Return the median output tokens per second of `num_runs` runs after a warm one; prompts are random tokens."""
    source = resolve_base(base)
    model = load_base(source.folder, quantization=quantization, base_id=source.id)
    settings = EngineSettings(num_slots=max(1, len(adapters)), max_running=max(64, num_requests))
    engine = Engine(model, settings)
    uses = [AdapterUse(digest=folder_digest(folder), folder=folder) for folder in adapters]
    for use in uses:
        engine.resolve_adapter(use.folder)
    numbers = itertools.count()
    generator = random.Random(0)  # noqa: S311 - the same work in every run, not a secret
    sampling = Sampling(max_tokens=num_output_tokens, temperature=0.0, ignore_eos=True)

    def one_run() -> tuple[float, float]:
        submits = [
            Submit(
                id=RequestId(str(next(numbers))),
                prompt=tuple(generator.randrange(100, model.vocab_size) for _ in range(num_prompt_tokens)),
                adapters=(uses[index % len(uses)],) if uses else (),
                sampling=sampling,
            )
            for index in range(num_requests)
        ]
        return _drive(engine, submits)

    one_run()
    runs = [one_run() for _ in range(num_runs)]
    seconds = statistics.median(total for total, _ in runs)
    engine.close()
    return {
        "engine": f"loractl-{quantization}",
        "requests": num_requests,
        "adapters": len(adapters),
        "prompt_tokens": num_prompt_tokens,
        "output_tokens": num_output_tokens,
        "output_tokens_per_s": round(num_requests * num_output_tokens / seconds, 1),
        "first_token_s": round(statistics.median(first for _, first in runs), 3),
    }


def _drive(engine: Engine, submits: Sequence[Submit]) -> tuple[float, float]:
    """Seconds until all have ended, and the median seconds to a first token."""
    start = time.perf_counter()
    for submit in submits:
        engine.submit(submit)
    first: dict[RequestId, float] = {}
    num_open = len(submits)
    while num_open:
        for event in engine.step().events:
            if isinstance(event, Token):
                first.setdefault(event.id, time.perf_counter() - start)
            elif isinstance(event, Failed):
                raise event.error
            elif isinstance(event, Finished):
                num_open -= 1
    return time.perf_counter() - start, statistics.median(first.values())
