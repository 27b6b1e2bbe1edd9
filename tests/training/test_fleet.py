"""Many adapters over one base: each equals the one that is trained alone, and one that fails takes nobody with it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loractl.adapters.errors import BadRecipe, Diverged, LoractlError, Unsupported, WillNotFit
from loractl.adapters.training.events import Shrunk
from loractl.adapters.training.recipe import Recipe, resolve_recipe
from loractl.adapters.training.run import Outcome, Task, run, run_fleet
from loractl.adapters.training.sweep import sweep_settings
from tiny_models import make_tiny_base

WORDS = ["quick", "brown", "fox", "jumps", "lazy", "dog", "film", "charm", "sense", "positive", "negative", "great"]

# Ranks, reach, rates, rows, seeds and lengths differ.
DIFFERENT: list[dict[str, Any]] = [
    {"adapter.rank": 2, "train.seed": 1},
    {"adapter.rank": 8, "adapter.targets": ["all-linear"], "train.learning_rate": 3e-3, "train.epochs": 2.0},
    {"adapter.rank": 4, "adapter.targets": ["down_proj"], "train.batch_size": 3, "adapter.rslora": True},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-base")


def _recipe(folder: Path, base: Path, out: str, **settings: Any) -> Recipe:
    rows = settings.pop("rows", 12)
    data = folder / f"rows{rows}.jsonl"
    texts = [{"text": " ".join(WORDS[i % 5 : i % 7 + 5]), "label": WORDS[9 + i % 2]} for i in range(rows)]
    data.write_text("".join(json.dumps(row) + "\n" for row in texts))
    given = {"base": str(base), "out": str(folder / out), "quantize": "none", "dtype": "float32"}
    parts = {"data.files": [str(data)], "data.eval_share": 0.2, "train.epochs": 3.0, "train.learning_rate": 1e-2}
    return resolve_recipe(preset="article", file=None, settings=given | parts | settings)


def _fleet(*recipes: Recipe, grouped: bool = False) -> list[Outcome | LoractlError]:
    return run_fleet([Task(recipe) for recipe in recipes], listener=lambda *_: None, grouped=grouped)


def _largest_difference(one: Outcome, other: Outcome) -> float:
    ours, theirs = (load_file(each.folder / "adapter_model.safetensors") for each in (one, other))
    assert ours.keys() == theirs.keys()
    return float(max((ours[name] - theirs[name]).abs().max().item() for name in ours))


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_fleet_members_are_bit_equal_to_runs_alone_when_sliced(tmp_path: Path, base: Path, quantize: str) -> None:
    def recipes(prefix: str) -> list[Recipe]:
        return [
            _recipe(tmp_path, base, f"{prefix}{i}", rows=10 + i, quantize=quantize, **settings)
            for i, settings in enumerate(DIFFERENT)
        ]

    together = _fleet(*recipes("fleet"))
    for recipe, member in zip(recipes("alone"), together, strict=True):
        alone = run(recipe, listener=lambda _: None)
        assert isinstance(member, Outcome)
        assert member.manifest.loss_curve == alone.manifest.loss_curve
        assert _largest_difference(member, alone) == 0.0
        assert member.manifest.probes == alone.manifest.probes


def test_fleet_members_agree_with_runs_alone_when_grouped(tmp_path: Path, base: Path) -> None:
    def recipes(prefix: str) -> list[Recipe]:
        return [
            _recipe(tmp_path, base, f"{prefix}{i}", rows=10 + i, **(settings | {"adapter.dropout": 0.0}))
            for i, settings in enumerate(DIFFERENT)
        ]

    together = _fleet(*recipes("fleet"), grouped=True)
    for recipe, member in zip(recipes("alone"), together, strict=True):
        alone = run(recipe, listener=lambda _: None)
        assert isinstance(member, Outcome)
        for (_, one), (_, other) in zip(member.manifest.loss_curve, alone.manifest.loss_curve, strict=True):
            assert one == pytest.approx(other, abs=1e-4)
        assert _largest_difference(member, alone) < 2e-3


def test_grouped_pass_drops_inputs_when_a_member_has_dropout(tmp_path: Path, base: Path) -> None:
    outcomes = _fleet(
        _recipe(tmp_path, base, "a", **{"adapter.dropout": 0.5}),
        _recipe(tmp_path, base, "b", **{"adapter.dropout": 0.0}),
        grouped=True,
    )
    alone = run(_recipe(tmp_path, base, "c", **{"adapter.dropout": 0.0}), listener=lambda _: None)
    first, second = outcomes
    assert isinstance(first, Outcome)
    assert isinstance(second, Outcome)
    assert _largest_difference(second, alone) < 2e-3
    assert _largest_difference(first, alone) > 2e-3


@pytest.mark.parametrize("grouped", [False, True])
def test_one_member_stops_alone_when_it_diverges(tmp_path: Path, base: Path, grouped: bool) -> None:
    good, bad = _fleet(
        _recipe(tmp_path, base, "good"),
        _recipe(tmp_path, base, "bad", **{"adapter.alpha": float("inf")}),
        grouped=grouped,
    )
    assert isinstance(good, Outcome)
    if isinstance(bad, Outcome):
        pytest.fail(f"an infinite scale did not diverge: {bad.manifest.loss_curve}")
    assert isinstance(bad, Diverged)
    assert bad.exit_code == 6
    assert not (tmp_path / "bad").exists()


def test_fleet_is_refused_when_recipes_name_different_bases_or_one_place(tmp_path: Path, base: Path) -> None:
    with pytest.raises(BadRecipe, match="quantize"):
        _fleet(_recipe(tmp_path, base, "a"), _recipe(tmp_path, base, "b", quantize="int8"))
    with pytest.raises(BadRecipe, match="two recipes"):
        _fleet(_recipe(tmp_path, base, "a"), _recipe(tmp_path, base, "a"))


def test_grouped_fleet_is_refused_when_a_member_has_dora(tmp_path: Path, base: Path) -> None:
    with pytest.raises(Unsupported, match="dora"):
        _fleet(_recipe(tmp_path, base, "a"), _recipe(tmp_path, base, "b", **{"adapter.dora": True}), grouped=True)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapter_begun_from_the_base_works_in_unmodified_peft(
    tmp_path: Path, base: Path, init: str, quantize: str
) -> None:
    settings = {"adapter.init": init, "adapter.dropout": 0.0, "quantize": quantize}
    outcome = run(_recipe(tmp_path, base, "out", **settings), listener=lambda _: None)
    assert outcome.manifest.rank == 16
    first_loss, last_loss = outcome.manifest.loss_curve[0][1], outcome.manifest.loss_curve[-1][1]
    plain = run(_recipe(tmp_path, base, "plain", quantize=quantize), listener=lambda _: None)
    # It begins as the base itself, as every adapter does, and then learns.
    assert first_loss == pytest.approx(plain.manifest.loss_curve[0][1], rel=2e-2)
    assert last_loss < first_loss
    if quantize == "none":
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(outcome.folder)
        ).eval()
        for probe in outcome.manifest.probes:
            ids = torch.tensor([probe.prompt_ids + probe.continuation_ids])
            with torch.inference_mode():
                logits = model(input_ids=ids).logits[0, len(probe.prompt_ids) - 1 : -1]
            expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(probe.continuation_ids).unsqueeze(1))
            torch.testing.assert_close(torch.tensor(probe.adapter_logprobs), expected.squeeze(1), atol=1e-4, rtol=0)


def test_effective_batch_stays_and_it_is_said_when_memory_runs_out(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loractl.adapters.training import loss, member

    settings = {"adapter.dropout": 0.0, "train.batch_size": 8, "train.accumulation": 1}
    whole = run(_recipe(tmp_path, base, "whole", **settings), listener=lambda _: None)
    plain = loss.summed_loss

    def small(model: Any, batch: Any) -> torch.Tensor:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("too many rows at once")
        return plain(model, batch)

    monkeypatch.setattr(member, "summed_loss", small)
    events: list[Any] = []
    outcome = run(_recipe(tmp_path, base, "small", **settings), listener=events.append)
    said = [event for event in events if isinstance(event, Shrunk)]
    assert [event.num_rows for event in said] == [4, 2]
    assert {event.rows_per_step for event in said} == {8}
    for (_, one), (_, other) in zip(outcome.manifest.loss_curve, whole.manifest.loss_curve, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_run_ends_with_advice_when_not_even_one_row_fits(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(model: Any, batch: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("nothing fits")

    monkeypatch.setattr("loractl.adapters.training.member.summed_loss", never)
    with pytest.raises(WillNotFit, match="one row"):
        run(_recipe(tmp_path, base, "out"), listener=lambda _: None)


def test_sweep_is_every_combination_under_short_names() -> None:
    points = sweep_settings(["lr=1e-4,3e-4", "rank=8,16"])
    assert [name for name, _ in points] == ["lr0.0001-rank8", "lr0.0001-rank16", "lr0.0003-rank8", "lr0.0003-rank16"]
    assert points[3][1] == {"train.learning_rate": 3e-4, "adapter.rank": 16}
    with pytest.raises(BadRecipe, match="KEY=VALUE"):
        sweep_settings(["lr"])


def test_member_has_diverged_when_its_loss_blows_up_though_it_stays_finite(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loractl.adapters.training import loss

    calls, plain = 0, loss.summed_loss

    def rising(model: Any, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return plain(model, batch) * (1.0 if calls < 12 else 20.0)

    monkeypatch.setattr("loractl.adapters.training.member.summed_loss", rising)
    with pytest.raises(Diverged, match="the loss rose from"):
        run(_recipe(tmp_path, base, "out", **{"train.epochs": 40.0}), listener=lambda _: None)


def test_rate_is_read_as_a_number_when_it_is_written_with_an_exponent_alone(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("train: {learning_rate: 1e-4}")
    recipe = resolve_recipe(preset=None, file=tmp_path / "recipe.yaml", settings={"train.weight_decay": "1E-2"})
    assert (recipe.train.learning_rate, recipe.train.weight_decay) == (1e-4, 1e-2)
