"""DPO on pairs: its loss and gradients beside the paper's formula on plain PEFT, and the run around it."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loractl.adapters.base_loading import load_base_model
from loractl.adapters.errors import BadData, BadRow, Interrupted, Unsupported
from loractl.adapters.training import member, preference
from loractl.adapters.training.events import Stepped
from loractl.adapters.training.examples import Example, make_example, marked_text
from loractl.adapters.training.planning import make_plan
from loractl.adapters.training.preference import Reference, pair_sums
from loractl.adapters.training.recipe import DataPart, PreferencePart, Recipe, resolve_recipe
from loractl.adapters.training.rows import read_rows
from loractl.adapters.training.run import Outcome, Task, prepare, run, run_fleet, tasks_to_resume
from loractl.adapters.training.trunk import Trunk
from loractl.cli.main import run as run_command
from tiny_models import make_adapter, make_tiny_base
from tiny_runs import write_rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

_TEXTS = ["a quick film", "lazy", "great charm and very little sense", "no sense", "the fox", "it was"]
_PAIRS = [{"prompt": text, "chosen": " great charm"[: 6 + n], "rejected": " no"} for n, text in enumerate(_TEXTS)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-base")


def _recipe(folder: Path, base: Path, out: str = "out", **settings: Any) -> Recipe:
    data = write_rows(folder / "pairs.jsonl", _PAIRS * 2)
    given = {"base": str(base), "out": str(folder / out), "quantize": "none", "dtype": "float32"}
    parts = {
        "data.files": [str(data)],
        "data.eval_share": 0.3,
        "train.epochs": 6.0,
        "train.learning_rate": 1e-2,
        "train.batch_size": 2,
        "train.accumulation": 2,
    }
    return resolve_recipe(preset="dpo", file=None, settings=given | parts | settings)


def _train(recipe: Recipe) -> tuple[Outcome, list[Stepped]]:
    events: list[Any] = []
    return run(recipe, listener=events.append), [event for event in events if isinstance(event, Stepped)]


def _weights(outcome: Outcome) -> dict[str, torch.Tensor]:
    return dict(load_file(outcome.folder / "adapter_model.safetensors"))


def _logprob(model: Any, one: Example) -> torch.Tensor:
    """The log probability of the learned tokens, from whole logits of one row without padding."""
    scores = torch.log_softmax(model(input_ids=torch.tensor([one.ids])).logits[0, :-1].float(), -1)
    found = scores.gather(1, torch.tensor(one.ids[1:]).unsqueeze(1)).squeeze(1)
    return (found * torch.tensor(one.learned[1:])).sum()


@pytest.mark.parametrize(
    "part",
    [PreferencePart(), PreferencePart(beta=0.5, label_smoothing=0.2), PreferencePart(sft_weight=0.7)],
    ids=["plain", "smoothed", "with sft"],
)
def test_loss_and_gradients_equal_the_papers_on_plain_peft(tmp_path: Path, base: Path, part: PreferencePart) -> None:
    folder = make_adapter(base, tmp_path / "adapter", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    pairs = [make_example(row, tokenizer, DataPart()) for row in read_rows(write_rows(tmp_path / "a.jsonl", _PAIRS))]
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder), is_trainable=True
    )
    expected = torch.zeros(())
    for pair in pairs:
        assert pair.rejected is not None
        with torch.no_grad(), plain.disable_adapter():
            ratio = -(_logprob(plain, pair) - _logprob(plain, pair.rejected))
        ratio = ratio + _logprob(plain, pair) - _logprob(plain, pair.rejected)
        one, other = F.logsigmoid(part.beta * ratio), F.logsigmoid(-part.beta * ratio)
        expected = expected - (1 - part.label_smoothing) * one - part.label_smoothing * other
        expected = expected - part.sft_weight * _logprob(plain, pair)
    expected.backward()  # type: ignore[no-untyped-call]
    recipe = _recipe(tmp_path, base, **{"adapter.start_from": str(folder)})
    trunk = Trunk(load_base_model(base, quantization="none", dtype="float32", device="cpu"))
    trunk.attach("default", recipe, revision=None, examples=[], fresh=True)
    trunk.activate("default")
    own = trunk.parameters("default")
    reference = Reference(trunk, "default", [weight for _, weight in own], is_adapter=False)
    sums = pair_sums(trunk, pairs, reference, part, sft_scale=part.sft_weight)
    sums.loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(sums.loss, expected, rtol=1e-5, atol=1e-5)
    theirs = {name.replace(".default.", "."): weight.grad for name, weight in plain.named_parameters()}
    for name, weight in own:
        wanted = next(grad for key, grad in theirs.items() if key.endswith(name.replace(".default.", ".")))
        torch.testing.assert_close(weight.grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_run_begins_at_log_2_and_learns_to_prefer(tmp_path: Path, base: Path, init: str) -> None:
    outcome, steps = _train(_recipe(tmp_path, base, **{"adapter.init": init}))
    assert steps[0].loss == pytest.approx(math.log(2), abs=1e-4)
    assert steps[0].reward_margin == pytest.approx(0, abs=1e-4)
    assert steps[-1].loss < steps[0].loss
    assert (steps[-1].reward_margin or 0) > 0.1
    assert steps[-1].reward_accuracy == 1.0
    assert outcome.manifest.task == "preference"
    assert outcome.manifest.metrics["eval_reward_accuracy"] == 1.0
    assert outcome.manifest.metrics["eval_reward_margin"] > 0
    card = (outcome.folder / "README.md").read_text()
    assert "preference optimization on pairs of answers against the base without adapter: beta 0.1" in card


def test_run_that_goes_on_is_held_against_the_adapter_that_it_began_with(tmp_path: Path, base: Path) -> None:
    first, _ = _train(_recipe(tmp_path, base, "first"))
    second, steps = _train(_recipe(tmp_path, base, "second", **{"adapter.start_from": str(first.folder)}))
    assert steps[0].loss == pytest.approx(math.log(2), abs=1e-4)
    assert f"against adapter `{first.digest[:19]}`" in (second.folder / "README.md").read_text()


@pytest.mark.parametrize("goes_on", [False, True])
def test_resumed_run_on_pairs_is_bit_equal(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, goes_on: bool
) -> None:
    more: dict[str, Any] = (
        {"adapter.start_from": str(make_adapter(base, tmp_path / "begin", seed=3))} if goes_on else {}
    )
    monkeypatch.setattr(member, "MICRO_BATCH_TOKENS", 16)
    whole, steps = _train(_recipe(tmp_path, base, "whole", **more))
    left = 3

    def counted(*arguments: Any, **settings: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return preference.pair_sums(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(member, "pair_sums", counted)
        with pytest.raises(Interrupted):
            _train(_recipe(tmp_path, base, "parts", **more))
    events: list[Any] = []
    (resumed,) = run_fleet(tasks_to_resume([tmp_path / "parts"]), listener=lambda _, event: events.append(event))
    assert isinstance(resumed, Outcome)
    ours, theirs = _weights(whole), _weights(resumed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = [event for event in events if isinstance(event, Stepped)]
    assert again[0].step == 2
    assert [(one.loss, one.reward_margin, one.reward_accuracy) for one in again] == [
        (one.loss, one.reward_margin, one.reward_accuracy) for one in steps[1:]
    ]


def test_fleet_of_pairs_and_reviews_takes_turns_and_is_refused_in_shared_passes(tmp_path: Path, base: Path) -> None:
    alone, _ = _train(_recipe(tmp_path, base, "alone"))
    reviews = write_rows(tmp_path / "reviews.jsonl", [{"text": text, "label": "no"} for text in _TEXTS])
    other = {"data.files": [str(reviews)], "data.eval_share": 0.0, "train.epochs": 1.0}

    def tasks(prefix: str) -> list[Task]:
        return [Task(_recipe(tmp_path, base, prefix + "0")), Task(_recipe(tmp_path, base, prefix + "1", **other))]

    together, _ = run_fleet(tasks("turn"), listener=lambda *_: None)
    assert isinstance(together, Outcome)
    ours, theirs = _weights(alone), _weights(together)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(Unsupported, match=r"group0: pairs \(DPO\) cannot share"):
        run_fleet(tasks("group"), listener=lambda *_: None, grouped=True)


_ASK = {"role": "user", "content": "great film?"}
_YES, _NO = ({"role": "assistant", "content": text} for text in ("great charm", "no sense"))


def test_messages_with_and_without_a_prompt_column_are_the_same_pair(tmp_path: Path, base: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": [_ASK, _NO, _ASK], "chosen": [_YES], "rejected": [_NO]},
        {"chosen": [_ASK, _NO, _ASK, _YES], "rejected": [_ASK, _NO, _ASK, _NO]},
        {"prompt": [_ASK, _NO, _ASK], "chosen": _YES, "rejected": _NO},
    ]
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    read = read_rows(write_rows(tmp_path / "a.jsonl", rows))
    examples = [make_example(row, tokenizer, DataPart()) for row in read]
    assert examples[0] == examples[1] == examples[2]
    pieces = marked_text(examples[0], tokenizer)
    learned = [text for text, is_learned in pieces if is_learned]
    assert len(learned) == 2
    assert learned[0].startswith("great charm")
    assert learned[1].startswith("no sense")
    assert all(text.endswith(tokenizer.eos_token) for text in learned)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "chosen": "b"}, "has 'prompt', 'chosen'"),
        ({"prompt": "a", "choosen": "b", "rejected": "c"}, "no column `chosen`, but `choosen`"),
        ({"chosen": "b", "rejected": "c"}, "there is no column prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "chosen is empty"),
        ({"prompt": [_ASK], "chosen": "b", "rejected": "c"}, "prompt is list, but chosen is text"),
        ({"prompt": "a", "chosen": [_YES], "rejected": [_NO]}, "prompt is str, but chosen is a list"),
        ({"prompt": [_ASK], "chosen": [_ASK, _YES], "rejected": [_NO]}, "chosen does not begin with an assistant"),
        ({"chosen": [_YES], "rejected": [_NO]}, "no beginning in common"),
        ({"prompt": [_ASK], "chosen": [_YES], "rejected": 3}, "rejected is not a list of messages"),
    ],
)
def test_pair_that_is_none_is_named_with_its_place(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRow, match=says) as caught:
        read_rows(write_rows(tmp_path / "a.jsonl", [row]))
    assert "a.jsonl:1" in caught.value.message


def test_held_out_rows_of_another_form_are_refused(tmp_path: Path, base: Path) -> None:
    reviews = write_rows(tmp_path / "reviews.jsonl", [{"text": "a", "label": "no"}])
    with pytest.raises(BadData, match=r"data.eval_files hold text\+label rows"):
        prepare(_recipe(tmp_path, base, "out", **{"data.eval_files": [str(reviews)]}))


def test_plan_show_and_eval_know_pairs(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = _recipe(tmp_path, base)
    plan = make_plan(recipe)
    inputs = prepare(recipe)
    assert plan.data.num_rows == len(inputs.train) == plan.num_steps * 4 // 6
    assert plan.data.num_tokens == sum(len(one.ids) for pair in inputs.train for one in pair.sequences)
    assert plan.num_padded_tokens >= 6 * plan.data.num_tokens
    assert run_command(["data", "show", recipe.data.files[0], "--base", str(base), "--row", "2"]) == 0
    assert "and not: ** no" in capsys.readouterr().out
    outcome, _ = _train(recipe)
    command = ["eval", str(outcome.folder), "--base", str(base), "--data", recipe.data.files[0], "--quantize", "none"]
    assert run_command([*command, "--json"]) == 0
    scores = {one["name"]: one["accuracy"] for one in json.loads(capsys.readouterr().out)}
    assert scores[str(outcome.folder)] > scores["base"]
