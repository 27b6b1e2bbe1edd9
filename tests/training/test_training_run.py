"""A run from file to folder on a tiny base, held against PEFT and transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loractl.adapters.errors import BadRecipe, BadRow, TargetsMissing
from loractl.adapters.training.examples import prepare_examples
from loractl.adapters.training.recipe import DataPart, resolve_recipe
from loractl.adapters.training.rows import read_rows, rows_digest
from loractl.adapters.training.run import Outcome, run
from loractl.adapters.validation import FolderTree, validate_tree
from tiny_models import make_tiny_base
from tiny_runs import tiny_recipe, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-base")


def _run(folder: Path, base: Path, **settings: Any) -> tuple[Outcome, list[Any]]:
    events: list[Any] = []
    return run(tiny_recipe(folder, base, **settings), listener=events.append), events


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_saved_adapter_gives_the_probes_logprobs_in_unmodified_peft(tmp_path: Path, base: Path) -> None:
    outcome, _ = _run(tmp_path, base)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(outcome.folder)
    ).eval()
    assert outcome.manifest.probes
    for probe in outcome.manifest.probes:
        ids = torch.tensor([probe.prompt_ids + probe.continuation_ids])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, len(probe.prompt_ids) - 1 : -1]
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(probe.continuation_ids).unsqueeze(1))
        torch.testing.assert_close(torch.tensor(probe.adapter_logprobs), expected.squeeze(1), atol=1e-4, rtol=0)
        assert probe.adapter_logprobs != probe.base_logprobs


def test_training_lowers_the_loss_and_reports_every_step(tmp_path: Path, base: Path) -> None:
    outcome, events = _run(tmp_path, base)
    losses = [event.loss for event in events if type(event).__name__ == "Stepped"]
    assert losses[-1] < losses[0]
    assert [loss for _, loss in outcome.manifest.loss_curve] == [round(loss, 6) for loss in losses]


def test_first_loss_equals_transformers_own_when_the_adapter_is_still_zero(tmp_path: Path, base: Path) -> None:
    recipe = tiny_recipe(tmp_path, base)
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    prepared = prepare_examples(read_rows(Path(recipe.data.files[0])), tokenizer, recipe.data, max_tokens=64)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for example in prepared.examples:
        logits = model(input_ids=torch.tensor([example.ids])).logits[0]
        learned = [index for index, flag in enumerate(example.learned) if flag]
        targets = torch.tensor([example.ids[index] for index in learned])
        total += F.cross_entropy(logits[[index - 1 for index in learned]], targets, reduction="sum").item()
        count += len(learned)
    _, events = _run(tmp_path, base, **{"data.eval_share": 0.0, "adapter.dropout": 0.0, "train.batch_size": 4})
    first = next(event for event in events if type(event).__name__ == "Stepped")
    assert first.loss == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("shape", [(1, 4), (2, 2), (4, 1)])
def test_loss_does_not_depend_on_how_a_step_is_split(tmp_path: Path, base: Path, shape: tuple[int, int]) -> None:
    settings = {"train.batch_size": shape[0], "train.accumulation": shape[1], "adapter.dropout": 0.0}
    split, _ = _run(tmp_path, base, **settings)
    whole, _ = _run(tmp_path, base, **{"train.batch_size": 4, "train.accumulation": 1, "adapter.dropout": 0.0})
    for (_, one), (_, other) in zip(split.manifest.loss_curve, whole.manifest.loss_curve, strict=True):
        assert one == pytest.approx(other, abs=2e-4)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_quantized_base_trains_and_passes_the_hubs_checks(tmp_path: Path, base: Path, quantize: str) -> None:
    outcome, _ = _run(tmp_path, base, quantize=quantize)
    assert validate_tree(FolderTree(outcome.folder)).verdict != "rejected"
    config = json.loads((outcome.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-base"
    assert outcome.manifest.base is not None
    assert outcome.manifest.base.quantization == quantize


def test_training_goes_on_from_an_adapter(tmp_path: Path, base: Path) -> None:
    first, _ = _run(tmp_path, base)
    second, _ = _run(tmp_path, base, out=str(tmp_path / "second"), **{"adapter.start_from": str(first.folder)})
    assert second.manifest.parent == first.digest
    assert second.manifest.loss_curve[0][1] < first.manifest.loss_curve[0][1]


def test_broken_row_is_named_by_file_and_line_and_nothing_is_trained(tmp_path: Path, base: Path) -> None:
    recipe = tiny_recipe(tmp_path, base)
    path = Path(recipe.data.files[0])
    path.write_text('{"text": "a", "label": "b"}\n{"text": "a", "label": }\n')
    events: list[Any] = []
    with pytest.raises(BadRow, match=r"rows\.jsonl:2:"):
        run(recipe, listener=events.append)
    assert events == []
    assert not (tmp_path / "out").exists()


def test_missing_target_lists_what_the_base_has(tmp_path: Path, base: Path) -> None:
    with pytest.raises(TargetsMissing) as caught:
        _run(tmp_path, base, **{"adapter.targets": ["W_pack"]})
    assert "q_proj x2" in (caught.value.hint or "")


def test_unknown_recipe_key_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(BadRecipe) as caught:
        resolve_recipe(preset=None, file=None, settings={"train.epocs": 3})
    assert "train.epochs" in (caught.value.hint or "")


def test_conversation_learns_only_the_answers_and_their_stop_token(base: Path, tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "no"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    rows = read_rows(write_rows(tmp_path / "chat.jsonl", [{"messages": messages}]))
    (example,) = prepare_examples(rows, tokenizer, DataPart(), max_tokens=512).examples
    learned = [token for token, flag in zip(example.ids, example.learned, strict=True) if flag]
    assert tokenizer.decode(learned) == "yes<|im_end|>no<|im_end|>"


def test_data_digest_ignores_the_order_of_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    one, other = write_rows(tmp_path / "one.jsonl", rows), write_rows(tmp_path / "other.jsonl", rows[::-1])
    assert rows_digest(read_rows(one)) == rows_digest(read_rows(other))
    assert rows_digest(read_rows(one)) != rows_digest(read_rows(write_rows(tmp_path / "less.jsonl", rows[:1])))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "text,label\nx,y\nz\n", "a.csv:3"),
        ("a.jsonl", '{"prompt": "x"}\n', "a.jsonl:1"),
        ("a.jsonl", '{"text": "x", "label": 3}\n', "label is int"),
        ("a.json", "[1]", "a row is an object"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n', "no assistant"),
    ],
)
def test_broken_data_says_where_and_why(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadRow, match=says):
        read_rows(tmp_path / name)
