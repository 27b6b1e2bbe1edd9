"""What requests do to each other, shared prefixes, preemption, cancels, changes no row: PEFT alone is the oracle."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from engine_drive import adapter_use
from loractl.adapters.errors import BadRequest, Incompatible, Overloaded
from loractl.server.engine.base_model import load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.messages import (
    AdapterUse,
    Cancel,
    Event,
    Failed,
    Finished,
    RequestId,
    Sampling,
    Submit,
    Token,
)
from loractl.server.engine.settings import EngineSettings
from tiny_models import make_adapter, make_tiny_base

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

NUM_OUTPUT_TOKENS = 12
ADAPTERS: dict[str, dict[str, Any]] = {
    "small": {"r": 1, "lora_alpha": 2, "seed": 1},
    "wide": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "seed": 2, "std": 0.1},
    "scaled": {"r": 5, "lora_alpha": 4, "use_rslora": True, "target_modules": ["o_proj", "down_proj"], "seed": 3},
    "pattern": {"r": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}, "seed": 4},
}
PROMPTS = [[5, 9, 40, 41], [7], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39], [100, 3, 250]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-base")


@pytest.fixture(scope="module")
def uses(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterUse]:
    root = tmp_path_factory.mktemp("adapters")
    folders = {name: make_adapter(base, root / name, **settings) for name, settings in ADAPTERS.items()}
    return {name: adapter_use(folder) for name, folder in folders.items()}


@pytest.fixture
def engine(base: Path) -> Iterator[Engine]:
    engine = _engine(base)
    yield engine
    engine.check_books()
    engine.close()


def _engine(base: Path, **settings: Any) -> Engine:
    given: dict[str, Any] = {
        "num_slots": 4,
        "max_rank": 8,
        "max_batch_tokens": 16,
        "max_running": 16,
        "kv_bytes": 1 << 20,
    }
    return Engine(load_base(base, quantization="none", dtype="float32"), EngineSettings(**(given | settings)))


def _submit(name: str, prompt: list[int], *uses: AdapterUse, **sampling: Any) -> Submit:
    given: dict[str, Any] = {"max_tokens": NUM_OUTPUT_TOKENS, "temperature": 0.0, "ignore_eos": True}
    chosen = Sampling(**(given | sampling))
    return Submit(id=RequestId(name), prompt=tuple(prompt), adapters=uses, sampling=chosen)


def _run(engine: Engine, *submits: Submit) -> dict[str, list[Event]]:
    for submit in submits:
        engine.submit(submit)
    events: dict[str, list[Event]] = {submit.id: [] for submit in submits}
    for _ in range(20_000):
        for event in engine.step().events:
            events[event.id].append(event)
        if all(got and isinstance(got[-1], Finished | Failed) for got in events.values()):
            break
    for got in events.values():
        assert sum(isinstance(event, Finished | Failed) for event in got) == 1
        assert isinstance(got[-1], Finished | Failed)
    return events


def _tokens(events: list[Event]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, Token)]


def _peft(base: Path, use: AdapterUse | None, prompt: list[int]) -> tuple[list[int], list[float]]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if use is not None:
        model = PeftModel.from_pretrained(model, str(use.folder))
    model.eval()
    ids, logprobs = list(prompt), []
    for _ in range(NUM_OUTPUT_TOKENS):
        with torch.inference_mode():
            scores = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1], -1)
        ids.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
    return ids[len(prompt) :], logprobs


def test_more_adapters_than_slots_all_answer_as_alone(base: Path, uses: dict[str, AdapterUse]) -> None:
    engine = _engine(base, num_slots=1)
    submits = [_submit(f"{name}-{turn}", PROMPTS[0], use) for turn in range(3) for name, use in uses.items()]
    events = _run(engine, *submits)
    for submit in submits:
        assert _tokens(events[submit.id]) == _peft(base, submit.adapters[0], PROMPTS[0])[0]
    assert engine.stats().counters.num_adapter_evictions > 0
    engine.check_books()
    engine.close()


def test_prefix_is_shared_within_an_adapter_and_never_across(
    base: Path, uses: dict[str, AdapterUse], engine: Engine
) -> None:
    prompt = list(range(50, 90))
    first = _run(engine, _submit("first", prompt, uses["wide"]))
    again = _run(engine, _submit("again", prompt, uses["wide"]))
    other = _run(engine, _submit("other", prompt, uses["small"]))
    ends = [events[name][-1] for name, events in (("first", first), ("again", again), ("other", other))]
    assert [end.num_cached_tokens for end in ends if isinstance(end, Finished)] == [0, 32, 0]
    assert _tokens(first["first"]) == _tokens(again["again"])
    assert _tokens(other["other"]) == _peft(base, uses["small"], prompt)[0]


def test_preempted_sequences_end_as_if_alone(base: Path, uses: dict[str, AdapterUse]) -> None:
    engine = _engine(base, kv_bytes=6 * 16 * 2 * 2 * 8 * 2 * 4)  # six blocks of this base
    submits = [_submit(f"row-{index}", list(range(20 + index, 50 + index)), uses["wide"]) for index in range(4)]
    events = _run(engine, *submits)
    for submit in submits:
        assert _tokens(events[submit.id]) == _peft(base, uses["wide"], list(submit.prompt))[0]
    engine.check_books()
    engine.close()


def test_cancelled_request_ends_once_and_gives_back_what_it_held(engine: Engine, uses: dict[str, AdapterUse]) -> None:
    engine.submit(_submit("long", PROMPTS[0], uses["wide"], max_tokens=400))
    events: list[Event] = []
    while not events:
        events += engine.step().events
    engine.cancel(Cancel(id=RequestId("long")))
    events += engine.step().events
    assert isinstance(events[-1], Finished)
    assert events[-1].reason == "cancelled"
    assert engine.stats().kv_blocks_used == 0


def test_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    whole = _run(engine, _submit("whole", PROMPTS[2], max_tokens=40))["whole"]
    text = "".join(event.text for event in whole if isinstance(event, Token | Finished))
    stop = text[5:8]
    cut = _run(engine, _submit("cut", PROMPTS[2], max_tokens=40, stop=(stop,)))["cut"]
    assert "".join(event.text for event in cut if isinstance(event, Token | Finished)) == text[: text.index(stop)]
    assert isinstance(cut[-1], Finished)
    assert cut[-1].stop_reason == stop


def test_seeded_request_repeats_whatever_runs_beside_it(engine: Engine) -> None:
    alone = _run(engine, _submit("alone", PROMPTS[0], temperature=1.0, seed=3))["alone"]
    crowd = [_submit(f"n{i}", PROMPTS[1], temperature=1.0) for i in range(5)]
    beside = _run(engine, *crowd, _submit("beside", PROMPTS[0], temperature=1.0, seed=3))["beside"]
    assert _tokens(alone) == _tokens(beside)


def test_weighted_adapters_are_summed(base: Path, uses: dict[str, AdapterUse], engine: Engine) -> None:
    half = AdapterUse(digest=uses["wide"].digest, folder=uses["wide"].folder, weight=0.5)
    events = _run(engine, _submit("sum", PROMPTS[0], half, num_logprobs=0))["sum"]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(half.folder)
    ).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.5
    with torch.inference_mode():
        scores = torch.log_softmax(model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1], -1)
    assert isinstance(events[0], Token)
    assert events[0].token_id == int(scores.argmax())
    assert events[0].logprob == pytest.approx(float(scores.max()), abs=1e-4)


def test_broken_adapter_fails_its_own_request_only(tmp_path: Path, engine: Engine, uses: dict[str, AdapterUse]) -> None:
    gone = AdapterUse(digest=uses["small"].digest, folder=tmp_path / "gone")
    events = _run(engine, _submit("bad", PROMPTS[0], gone), _submit("good", PROMPTS[0]))
    assert isinstance(events["bad"][-1], Failed)
    assert isinstance(events["good"][-1], Finished)


def test_prompt_too_long_and_full_queue_are_refused_at_once(base: Path) -> None:
    engine = _engine(base, max_queue=0, max_running=1)
    with pytest.raises(BadRequest):
        engine.submit(_submit("long", [5] * 600))
    engine.submit(_submit("one", PROMPTS[0]))
    with pytest.raises(Overloaded):
        engine.submit(_submit("two", PROMPTS[0]))
    engine.close()


def test_adapter_of_another_shape_or_rank_is_refused_with_the_reason(
    tmp_path: Path, engine: Engine, uses: dict[str, AdapterUse], base: Path
) -> None:
    engine.resolve_adapter(uses["wide"].folder)
    other = make_tiny_base(tmp_path / "other", hidden_size=64)
    with pytest.raises(Incompatible, match="in the base"):
        engine.resolve_adapter(make_adapter(other, tmp_path / "other-adapter"))
    with pytest.raises(Incompatible, match="rank 16"):
        engine.resolve_adapter(make_adapter(base, tmp_path / "high", r=16))
