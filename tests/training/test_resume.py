"""Runs that are stopped and go on: bit-equal to those that were not, and refused where something else would go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loractl.adapters.errors import Conflict, Interrupted, NotFound
from loractl.adapters.training.events import Resumed, Saved, Stepped
from loractl.adapters.training.recipe import Recipe, resolve_recipe
from loractl.adapters.training.run import Outcome, Task, run_fleet, tasks_to_resume
from tiny_models import make_tiny_base

WORDS = ["quick", "brown", "fox", "jumps", "lazy", "dog", "film", "charm", "sense", "positive", "negative", "great"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-base")


def _recipe(folder: Path, base: Path, out: str, **settings: Any) -> Recipe:
    data = folder / "rows.jsonl"
    if not data.exists():
        rows = [{"text": " ".join(WORDS[i % 5 : i % 7 + 5]), "label": WORDS[9 + i % 2]} for i in range(20)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"base": str(base), "out": str(folder / out), "quantize": "none", "dtype": "float32"}
    parts = {
        "data.files": [str(data)],
        "data.eval_share": 0.2,
        "train.epochs": 3.0,
        "train.learning_rate": 1e-2,
        "train.accumulation": 3,
        "train.eval_every": 2,
    }
    return resolve_recipe(preset="article", file=None, settings=given | parts | settings)


def _split_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make several micro-batches of each step, though the rows are short."""
    monkeypatch.setattr("loractl.adapters.training.member.MICRO_BATCH_TOKENS", 16)


def _stop_after(monkeypatch: pytest.MonkeyPatch, num_micro_batches: int) -> None:
    """Ask for a stop, as a signal would, once that many micro-batches are done."""
    from loractl.adapters.training import loss, member

    count, plain = 0, loss.summed_loss

    def counted(model: Any, batch: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == num_micro_batches:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(model, batch)

    monkeypatch.setattr(member, "summed_loss", counted)


def _train(*recipes: Recipe, tasks: Any = None) -> tuple[list[Outcome], list[Any]]:
    events: list[Any] = []
    outcomes = run_fleet(tasks or [Task(recipe) for recipe in recipes], listener=lambda _, event: events.append(event))
    assert all(isinstance(outcome, Outcome) for outcome in outcomes)
    return [outcome for outcome in outcomes if isinstance(outcome, Outcome)], events


def _weights(outcome: Outcome) -> dict[str, torch.Tensor]:
    return dict(load_file(outcome.folder / "adapter_model.safetensors"))


def _assert_equal(one: Outcome, other: Outcome) -> None:
    assert one.manifest.loss_curve == other.manifest.loss_curve
    ours, theirs = _weights(one), _weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("stop_at", [1, 4, 8])
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_resumed_run_is_bit_equal_when_stopped_in_the_middle_of_an_accumulation(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int, quantize: str
) -> None:
    _split_rows(monkeypatch)
    (whole,), _ = _train(_recipe(tmp_path, base, "whole", quantize=quantize))
    with monkeypatch.context() as patch:
        _stop_after(patch, stop_at)
        with pytest.raises(Interrupted) as stopped:
            _train(_recipe(tmp_path, base, "parts", quantize=quantize))
    assert stopped.value.exit_code == 130
    assert f"loractl train --resume {tmp_path / 'parts'}" in (stopped.value.hint or "")
    assert not (tmp_path / "parts").exists()
    (resumed,), events = _train(tasks=tasks_to_resume([tmp_path / "parts"]))
    assert any(isinstance(event, Resumed) for event in events)
    _assert_equal(whole, resumed)
    assert not (tmp_path / "parts.checkpoint").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"train.lora_plus": 4.0},
        {"adapter.dora": True},
        {"adapter.init": "pissa"},
        {"adapter.init": "eva"},
        {"train.checkpoint_activations": True},
    ],
)
def test_resumed_run_is_bit_equal_with_every_option(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    _split_rows(monkeypatch)
    (whole,), _ = _train(_recipe(tmp_path, base, "whole", **settings))
    with monkeypatch.context() as patch:
        _stop_after(patch, 7)
        with pytest.raises(Interrupted):
            _train(_recipe(tmp_path, base, "parts", **settings))
    (resumed,), _ = _train(tasks=tasks_to_resume([tmp_path / "parts"]))
    _assert_equal(whole, resumed)


def _interrupted(folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Path:
    with monkeypatch.context() as patch:
        _stop_after(patch, 3)
        with pytest.raises(Interrupted):
            _train(_recipe(folder, base, "out", **settings))
    return folder / "out"


def test_resume_is_refused_by_the_files_name_when_data_changed(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = _interrupted(tmp_path, base, monkeypatch)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"text": "one more", "label": "negative"}\n')
    with pytest.raises(Conflict, match=r"rows\.jsonl changed"):
        _train(tasks=tasks_to_resume([out]))


def test_resume_is_refused_when_the_base_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_tiny_base(tmp_path / "base")
    out = _interrupted(tmp_path, base, monkeypatch)
    make_tiny_base(base, seed=1)
    with pytest.raises(Conflict, match="base changed"):
        _train(tasks=tasks_to_resume([out]))


def test_new_run_is_refused_when_it_would_throw_away_an_unfinished_one(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupted(tmp_path, base, monkeypatch)
    with pytest.raises(Conflict) as refused:
        _train(_recipe(tmp_path, base, "out"))
    assert "--resume" in (refused.value.hint or "")


def test_resume_of_a_finished_run_says_so(tmp_path: Path, base: Path) -> None:
    _train(_recipe(tmp_path, base, "out"))
    with pytest.raises(NotFound, match="finished"):
        tasks_to_resume([tmp_path / "out"])


def test_unfinished_write_is_passed_over_when_the_process_was_killed_in_it(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = _interrupted(tmp_path, base, monkeypatch)
    torn = tmp_path / "out.checkpoint" / "writing-1"
    torn.mkdir()
    (torn / "tensors.safetensors").write_bytes(b"half")
    (outcome,), _ = _train(tasks=tasks_to_resume([out]))
    assert outcome.manifest.loss_curve


def test_fleet_resumes_whole_from_the_folder_of_its_results(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("fleet/a", "fleet/b")
    alone = [_train(_recipe(tmp_path, base, f"alone-{i}", **{"train.seed": i}))[0][0] for i in range(2)]
    with monkeypatch.context() as patch:
        _stop_after(patch, 9)
        with pytest.raises(Interrupted):
            _train(*(_recipe(tmp_path, base, name, **{"train.seed": i}) for i, name in enumerate(names)))
    resumed, _ = _train(tasks=tasks_to_resume([tmp_path / "fleet"]))
    for one, other in zip(alone, resumed, strict=True):
        _assert_equal(one, other)


def test_best_weights_are_saved_and_the_run_stops_early_when_the_held_out_loss_rises(
    tmp_path: Path, base: Path
) -> None:
    recipe = _recipe(
        tmp_path,
        base,
        "out",
        **{"train.learning_rate": 0.3, "train.epochs": 30.0, "train.patience": 2, "train.eval_every": 1},
    )
    (outcome,), events = _train(recipe)
    steps = [event.step for event in events if isinstance(event, Stepped)]
    evals = {event.step: event.loss for event in events if type(event).__name__ == "Evaluated"}
    assert len(steps) < 80
    best = min(evals, key=lambda step: evals[step])
    assert outcome.manifest.metrics["best_step"] == best
    assert outcome.manifest.metrics["eval_loss"] == pytest.approx(evals[best], abs=1e-5)


@pytest.mark.slow
def test_killed_process_leaves_a_checkpoint_that_goes_on_bit_equal(tmp_path: Path, base: Path) -> None:
    (whole,), _ = _train(_recipe(tmp_path, base, "whole", **{"train.epochs": 60.0, "train.save_every": 1}))
    _recipe(tmp_path, base, "parts")
    command = [sys.executable, "-m", "loractl.cli", "train", "--preset", "article", "--base", str(base)]
    command += ["--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "parts"), "--quantize", "none"]
    for setting in (
        "dtype=float32", "data.eval_share=0.2", "train.epochs=60", "train.learning_rate=1e-2", "train.accumulation=3",
        "train.eval_every=2", "train.save_every=1",
    ):  # fmt: skip
        command += ["--set", setting]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, stdout=subprocess.DEVNULL)
    try:
        folder = tmp_path / "parts.checkpoint"
        deadline = time.monotonic() + 60
        while not list(folder.glob("step-0000000[3-9]*")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert folder.is_dir(), (tmp_path / "log").read_text()
    (resumed,), events = _train(tasks=tasks_to_resume([tmp_path / "parts"]))
    assert any(isinstance(event, Saved) for event in events)
    _assert_equal(whole, resumed)
