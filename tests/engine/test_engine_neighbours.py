"""A request's numbers among 64 strangers are those of the request alone; the largest difference is printed."""

from pathlib import Path
from typing import Any

import pytest

from engine_drive import Drive, adapter_use
from loractl.server.engine.base_model import load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.messages import AdapterUse, RequestId, Sampling, Submit
from loractl.server.engine.settings import EngineSettings
from tiny_models import make_adapter, make_tiny_base

NUM_STRANGERS = 64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "dtype", "tolerance"),
    [("none", "float32", 1e-4), ("none", "bfloat16", 0.05), ("int8", "float32", 1e-4), ("int8", "bfloat16", 0.05)],
)
def test_logprobs_among_strangers_are_those_of_the_request_alone(
    tmp_path: Path, quantization: Any, dtype: Any, tolerance: float
) -> None:
    folder = make_tiny_base(tmp_path / "base", hidden_size=64)
    folders = [make_adapter(folder, tmp_path / f"a{seed}", seed=seed, r=seed + 1) for seed in range(4)]
    uses: list[tuple[AdapterUse, ...]] = [
        (),
        *((adapter_use(each),) for each in folders),
    ]
    settings = EngineSettings(
        num_slots=4, max_rank=4, max_running=80, max_batch_tokens=160, kv_bytes=1 << 22, prefix_cache=False
    )
    drive = Drive(Engine(load_base(folder, quantization=quantization, dtype=dtype), settings))

    def ask(name: str, prompt: tuple[int, ...], kind: int, num_tokens: int) -> Submit:
        sampling = Sampling(
            max_tokens=num_tokens, temperature=0.0, ignore_eos=True, num_logprobs=0, num_prompt_logprobs=0
        )
        return Submit(id=RequestId(name), prompt=prompt, sampling=sampling, adapters=uses[kind])

    largest = 0.0
    for kind in range(len(uses)):
        prompt = tuple(range(20 + kind, 44 + kind))
        drive.submit([ask(f"alone{kind}", prompt, kind, 6)])
        drive.until_ended()
        strangers = [ask(f"s{kind}-{n}", (n + 3, 2 * n + 5, 7)[: 1 + n % 3], n % len(uses), 8) for n in range(64)]
        drive.submit([*strangers[:40], ask(f"beside{kind}", prompt, kind, 6), *strangers[40:]])
        drive.until_ended()
        alone, beside = (drive.outcomes[RequestId(f"{name}{kind}")] for name in ("alone", "beside"))
        assert beside.ids == alone.ids
        for first, second in zip(alone.tokens, beside.tokens, strict=True):
            assert first.logprob is not None
            assert second.logprob is not None
            largest = max(largest, abs(first.logprob - second.logprob))
        shown = [outcome.finished.prompt_logprobs or () for outcome in (alone, beside)]
        for first_row, second_row in zip(*shown, strict=True):
            largest = max(largest, abs(first_row[0].logprob - second_row[0].logprob))
    assert max(record.num_requests for record in drive.records) > NUM_STRANGERS
    print(f"\nneighbours quantization={quantization} dtype={dtype} largest_logprob_difference={largest:.2e}")
    assert largest <= tolerance
    drive.engine.close()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize(("quantization", "dtype"), [("none", "float32"), ("int8", "bfloat16")])
def test_rows_of_the_base_are_the_same_to_the_bit_when_neighbours_have_adapters(
    tmp_path: Path, quantization: Any, dtype: Any
) -> None:
    folder = make_tiny_base(tmp_path / "base", hidden_size=64, tie_word_embeddings=False)
    kinds: list[dict[str, Any]] = [
        {"target_modules": "all-linear", "r": 8},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"target_modules": ["v_proj", "down_proj"], "use_dora": True},
    ]
    folders = [make_adapter(folder, tmp_path / f"a{seed}", seed=seed, **kind) for seed, kind in enumerate(kinds)]
    uses = [adapter_use(each) for each in folders]
    settings = EngineSettings(num_slots=3, max_rank=8, max_running=16, kv_bytes=1 << 22, prefix_cache=False)
    drive = Drive(Engine(load_base(folder, quantization=quantization, dtype=dtype), settings))

    def answers(name: str, *, with_adapters: bool) -> list[Any]:
        """Everything told of eight rows of the base, each beside a row of which only the adapter changes."""
        drive.records.clear()
        sampling = Sampling(max_tokens=6, temperature=0.0, ignore_eos=True, num_logprobs=20, num_prompt_logprobs=5)
        for n in range(8):
            prompt, use = tuple(range(20 + n, 23 + 2 * n)), (uses[n % 3],) if with_adapters else ()
            own = Submit(id=RequestId(f"{name}{n}"), prompt=prompt, sampling=sampling)
            drive.submit([own, Submit(id=RequestId(f"{name}-s{n}"), prompt=prompt, sampling=sampling, adapters=use)])
        drive.until_ended()
        of_base = [drive.outcomes[RequestId(f"{name}{n}")] for n in range(8)]
        return [(row.ids, [token.top for token in row.tokens], row.finished.prompt_logprobs) for row in of_base]

    answers("warm", with_adapters=True)  # all resident: the batches that are compared have the same rows
    plain, mixed = (answers(name, with_adapters=name == "mixed") for name in ("plain", "mixed"))
    assert max(record.num_distinct_adapters for record in drive.records) == 3
    assert drive.outcomes[RequestId("mixed-s0")].ids != drive.outcomes[RequestId("plain-s0")].ids
    assert mixed == plain
    drive.engine.close()
