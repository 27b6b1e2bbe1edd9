"""Scores against PEFT and transformers: each adapter alone, row by row, gives the figures of the shared passes."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loractl.adapters.base_loading import load_base_model
from loractl.adapters.manifest import load_manifest
from loractl.adapters.training.examples import make_example
from loractl.adapters.training.recipe import DataPart
from loractl.adapters.training.rows import read_rows, rows_digest
from loractl.adapters.training.scoring import BASE, Scorer, written_answers
from loractl.cli.main import run
from tiny_models import make_adapter, make_tiny_base

_TEMPLATE = "Review: {text} Label: {label}"
_TEXTS = ["a quick film", "lazy", "great charm and very little sense", "no sense", "the fox", "it was"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scoring")
    make_tiny_base(folder / "tiny-base")
    make_adapter(folder / "tiny-base", folder / "a", seed=1)
    make_adapter(folder / "tiny-base", folder / "b", seed=2, r=8, target_modules=["up_proj", "o_proj"])
    make_adapter(folder / "tiny-base", folder / "dora", seed=3, use_dora=True)
    lines = [json.dumps({"text": text, "label": ("positive", "negative")[n % 2]}) for n, text in enumerate(_TEXTS)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder


def _logits(model: Any, ids: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0].float()  # type: ignore[no-any-return]


def _oracle(model: Any, tokenizer: Any) -> tuple[float, float, float]:
    """Loss, exact match and label accuracy, one row and one label at a time."""
    nats, num_learned, num_exact, num_hits = 0.0, 0, 0, 0
    for number, text in enumerate(_TEXTS):
        right = ("positive", "negative")[number % 2]
        sums = {}
        for label in ("negative", "positive"):
            prompt = tokenizer(f"Review: {text} Label:")["input_ids"]
            answer = tokenizer(f" {label}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            logits = _logits(model, prompt + answer)[len(prompt) - 1 : -1]
            scores = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer).unsqueeze(1))
            sums[label] = float(scores.sum())
            if label == right:
                nats, num_learned = nats - sums[label], num_learned + len(answer)
                num_exact += logits.argmax(-1).tolist() == answer
        num_hits += max(sums, key=lambda label: sums[label]) == right
    return nats / num_learned, num_exact / len(_TEXTS), num_hits / len(_TEXTS)


@pytest.mark.parametrize("names", [("a", "b"), ("a", "dora"), ()])
def test_scores_equal_pefts_one_adapter_and_one_row_at_a_time(folder: Path, names: tuple[str, ...]) -> None:
    base = folder / "tiny-base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load_base_model(base, quantization="none", dtype="float32")
    scorer = Scorer(model, [(name, folder / name) for name in names])
    assert scorer.shares_passes == (names == ("a", "b"))
    rows = read_rows(folder / "rows.jsonl", columns=["text", "label"])
    scores = scorer.score(rows, tokenizer, DataPart(template=_TEMPLATE))
    assert [score.name for score in scores] == [BASE, *names]
    for score in scores:
        plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        alone = plain if score.name == BASE else PeftModel.from_pretrained(plain, str(folder / score.name)).eval()
        loss, exact, accuracy = _oracle(alone, tokenizer)
        assert score.loss == pytest.approx(loss, abs=1e-4)
        assert (score.exact_match, score.accuracy) == (exact, accuracy)


def test_written_answers_equal_transformers_own(folder: Path) -> None:
    base = folder / "tiny-base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load_base_model(base, quantization="none", dtype="float32")
    scorer = Scorer(model, [("a", folder / "a"), ("b", folder / "b")])
    rows = read_rows(folder / "rows.jsonl", columns=["text", "label"])
    part = DataPart(template=_TEMPLATE)
    lines = list(written_answers(scorer, rows, tokenizer, part, max_new_tokens=6))
    for name in (BASE, "a", "b"):
        plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        alone = plain if name == BASE else PeftModel.from_pretrained(plain, str(folder / name)).eval()
        for row, line in zip(rows, lines, strict=True):
            example = make_example(row, tokenizer, part)
            prompt = torch.tensor([example.ids[: example.learned.index(True)]])
            output = alone.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
            expected = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
            assert line["answers"][name] == expected


def test_multiple_choice_takes_each_rows_own_choices(folder: Path, tmp_path: Path) -> None:
    base = folder / "tiny-base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    choices = [" fox", " dog", " film"]
    path = tmp_path / "choices.jsonl"
    path.write_text(json.dumps({"prompt": "the quick", "choices": choices, "answer": 0}))
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    prompt = tokenizer("the quick")["input_ids"]
    sums = []
    for choice in choices:
        answer = tokenizer(choice, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        scores = torch.log_softmax(_logits(model, prompt + answer)[len(prompt) - 1 : -1], -1)
        sums.append(float(scores.gather(1, torch.tensor(answer).unsqueeze(1)).sum()))
    likeliest = max(range(3), key=lambda number: sums[number])
    for right in range(3):
        path.write_text(json.dumps({"prompt": "the quick", "choices": choices, "answer": right}))
        (score,) = Scorer(model, []).score(read_rows(path), tokenizer, DataPart())
        assert score.accuracy == float(right == likeliest)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_command_scores_ways_to_hold_the_base_and_records(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = shutil.copytree(folder / "a", tmp_path / "a")
    answers = tmp_path / "answers.jsonl"
    words = ["eval", str(adapter), "--base", str(folder / "tiny-base"), "--data", str(folder / "rows.jsonl")]
    more = ["--template", _TEMPLATE, "--compare", "fp32,int8", "--generate", str(answers), "--max-new-tokens", "2"]
    assert run([*words, *more, "--record", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["held"]) for one in scores] == [
        (name, held) for held in ("fp32", "int8") for name in (BASE, str(adapter))
    ]
    assert scores[0]["loss"] != scores[2]["loss"]
    assert math.isclose(scores[0]["loss"], scores[2]["loss"], rel_tol=0.1)
    manifest = load_manifest(adapter)
    assert manifest is not None
    assert manifest.metrics["eval_accuracy"] == pytest.approx(scores[1]["accuracy"], abs=1e-6)
    assert manifest.measured_on["eval_accuracy"] == rows_digest(
        read_rows(folder / "rows.jsonl", columns=["text", "label"])
    )
    assert len(answers.read_text().splitlines()) == len(_TEXTS)
