"""The engine's whole path of a card, its graphs by their double where there is none, against PEFT for each request."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_drive import Drive, adapter_use
from interpreted import card_path
from loractl.server.engine.base_model import load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.messages import AdapterUse, RequestId, Sampling, Submit
from loractl.server.engine.settings import EngineSettings
from peft_oracle import alone
from tiny_models import make_adapter, make_tiny_base

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SETTINGS = EngineSettings(num_slots=3, max_rank=8, max_batch_tokens=32, max_running=4, kv_bytes=1 << 20)
PROMPTS = [(5, 9, 40, 41), (7,), (30, 31, 32, 33, 34, 35, 36, 37, 38, 39), (100, 3, 250)]
NUM_OUTPUT_TOKENS = 3


@pytest.fixture(scope="module", autouse=True)
def _on_card() -> Iterator[None]:
    with card_path():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-base")


@pytest.fixture(scope="module")
def uses(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterUse]:
    root = tmp_path_factory.mktemp("adapters")
    kinds: dict[str, dict[str, Any]] = {
        "small": {"r": 1, "lora_alpha": 2, "seed": 1},
        "wide": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "seed": 2, "std": 0.1},
        "dora": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"], "seed": 3},
    }
    folders = {name: make_adapter(base, root / name, **settings) for name, settings in kinds.items()}
    return {name: adapter_use(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def drive(base: Path) -> Iterator[Drive]:
    engine = Engine(load_base(base, quantization="none", dtype="float32"), SETTINGS)
    yield Drive(engine)
    engine.close()


def _submit(name: str, prompt: tuple[int, ...], *uses: AdapterUse, **sampling: Any) -> Submit:
    given: dict[str, Any] = {"max_tokens": NUM_OUTPUT_TOKENS, "temperature": 0.0, "ignore_eos": True}
    return Submit(id=RequestId(name), prompt=prompt, adapters=uses, sampling=Sampling(**(given | sampling)))


def test_rows_of_a_mixed_batch_equal_peft_alone_and_decode_as_recorded_steps(
    base: Path, uses: dict[str, AdapterUse], drive: Drive
) -> None:
    names = ["base", "small", "wide", "base"]
    before, before_ahead = drive.engine._runner.num_replays, drive.engine._ahead.num_ahead
    drive.submit(
        _submit(f"mixed-{index}", prompt, *([uses[name]] if name in uses else []))
        for index, (name, prompt) in enumerate(zip(names, PROMPTS, strict=True))
    )
    drive.until_ended(timeout_s=600)
    assert drive.engine._runner.num_replays >= before + NUM_OUTPUT_TOKENS - 1
    assert drive.engine._ahead.num_ahead >= before_ahead + NUM_OUTPUT_TOKENS - 1
    for index, (name, prompt) in enumerate(zip(names, PROMPTS, strict=True)):
        expected, _, _ = alone(base, uses[name].folder if name in uses else None, prompt, NUM_OUTPUT_TOKENS)
        assert drive.outcomes[RequestId(f"mixed-{index}")].ids == expected, name


def test_what_no_graph_holds_runs_unrecorded(base: Path, uses: dict[str, AdapterUse], drive: Drive) -> None:
    before = drive.engine._runner.num_replays
    drive.submit([_submit("dora", PROMPTS[0], uses["dora"], max_tokens=2)])
    drive.until_ended(timeout_s=600)
    assert drive.engine._runner.num_replays == before
    expected, _, _ = alone(base, uses["dora"].folder, PROMPTS[0], 2)
    assert drive.outcomes[RequestId("dora")].ids == expected


def test_int8_rows_do_not_change_with_their_neighbours(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base", num_hidden_layers=1)
    folder = make_adapter(base, tmp_path / "wide", r=8, target_modules="all-linear", seed=2, std=0.1)
    use = adapter_use(folder)
    drive = Drive(Engine(load_base(base, quantization="int8", dtype="bfloat16"), SETTINGS))
    drive.submit([_submit("alone", PROMPTS[3], use)])
    drive.until_ended(timeout_s=600)
    drive.submit([_submit("beside", PROMPTS[3], use), _submit("other", PROMPTS[0])])
    drive.until_ended(timeout_s=600)
    assert drive.outcomes[RequestId("beside")].ids == drive.outcomes[RequestId("alone")].ids
    drive.engine.close()


def test_seeds_filters_and_log_probabilities_hold_on_the_device(base: Path, drive: Drive) -> None:
    warm: dict[str, Any] = {"temperature": 1.5, "seed": 11, "top_p": 0.9}
    drive.submit([_submit("first", PROMPTS[0], **warm), _submit("top-1", PROMPTS[3], temperature=2.0, top_k=1)])
    drive.until_ended(timeout_s=600)
    drive.submit([
        _submit("again", PROMPTS[0], **warm),
        _submit("greedy", PROMPTS[3], num_logprobs=2, logit_bias={4: 0.0}),
        _submit("early", PROMPTS[1], temperature=1.0, seed=1, min_tokens=1, max_tokens=2),
    ])  # fmt: skip
    drive.until_ended(timeout_s=600)
    found = {name: drive.outcomes[RequestId(name)] for name in ("first", "again", "top-1", "greedy")}
    assert found["again"].ids == found["first"].ids
    expected, logprobs, _ = alone(base, None, PROMPTS[3], NUM_OUTPUT_TOKENS)
    assert found["top-1"].ids == found["greedy"].ids == expected
    told = [token.logprob for token in found["greedy"].tokens]
    torch.testing.assert_close(torch.tensor(told), torch.tensor(logprobs), rtol=1e-3, atol=1e-3)


def test_an_embedding_of_one_token_is_no_recorded_step(drive: Drive) -> None:
    given = _submit("embedded", (7,), max_tokens=1)
    drive.submit([dataclasses.replace(given, wants_embedding=True)])
    drive.until_ended(timeout_s=600)
    found = drive.outcomes[RequestId("embedded")].finished.embedding
    assert found is not None
    assert len(found) == 32
    assert sum(value * value for value in found) == pytest.approx(1.0, abs=1e-4)
