"""Merging: the merged model and the merged adapter compute what PEFT computes from their parts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loractl.adapters.base_identity import identify_base
from loractl.adapters.base_source import BaseSource
from loractl.adapters.errors import BaseMismatch, Incompatible, UsageError
from loractl.adapters.manifest import BasePin, Manifest, load_manifest, save_manifest
from loractl.adapters.merging import merge_into_base, merge_together
from loractl.adapters.training.examples import Example
from loractl.adapters.training.probes import make_probes
from loractl.adapters.validation import FolderTree, Policy, validate_tree
from loractl.cli.main import run
from tiny_models import make_adapter, make_tiny_base

_IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="module")
def source(base: Path) -> BaseSource:
    return BaseSource(base, "base", None)


@pytest.fixture(scope="module")
def pair(base: Path) -> list[Path]:
    return [
        make_adapter(base, base.parent / "one", seed=1, r=4),
        make_adapter(base, base.parent / "two", seed=2, r=4, target_modules=["q_proj", "down_proj"], lora_alpha=4),
    ]


def _model(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def _logits(base: Path, adapter: Path) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = PeftModel.from_pretrained(_model(base), str(adapter)).eval()(_IDS).logits
    return logits


def test_merged_model_answers_as_base_and_adapter_and_says_how_far_its_probes_moved(
    base: Path, source: BaseSource, pair: list[Path], tmp_path: Path
) -> None:
    wrapped = PeftModel.from_pretrained(_model(base), str(pair[0]))
    probes = make_probes(wrapped, [Example(tuple(range(3, 20)), (False,) * 10 + (True,) * 7)])
    save_manifest(Manifest(base=_pin(base), probes=probes), pair[0])
    merged = merge_into_base(pair[0], source, tmp_path / "model", dtype="float32")
    with torch.inference_mode():
        torch.testing.assert_close(_model(merged.folder)(_IDS).logits, _logits(base, pair[0]), atol=1e-4, rtol=1e-4)
    assert merged.drift is not None
    assert merged.drift < 1e-3
    assert (merged.folder / "tokenizer.json").is_file()


def test_sum_of_two_adapters_is_the_weighted_sum_of_their_changes(
    base: Path, source: BaseSource, pair: list[Path], tmp_path: Path
) -> None:
    """The oracle adds the two changes to the weights by hand, through PEFT's own delta."""
    merged = merge_together(pair, source, tmp_path / "both", weights=[0.5, 2.0])
    model = _model(base)
    with torch.no_grad():
        for folder, weight in zip(pair, (0.5, 2.0), strict=True):
            part: Any = PeftModel.from_pretrained(_model(base), str(folder))
            for name, module in part.get_base_model().named_modules():
                if hasattr(module, "get_delta_weight"):
                    model.get_submodule(name).weight += weight * module.get_delta_weight("default")
        torch.testing.assert_close(model(_IDS).logits, _logits(base, merged.folder), atol=1e-4, rtol=1e-4)
    record = load_manifest(merged.folder)
    assert record is not None
    assert record.recipe["merge"]["weights"] == [0.5, 2.0]
    assert not validate_tree(FolderTree(merged.folder), policy=Policy(base_pin="reject"), base=None).rejections


@pytest.mark.parametrize("method", ["linear", "svd", "ties", "dare_linear", "dare_ties"])
def test_pefts_other_methods_make_an_adapter_that_changes_the_base(
    base: Path, source: BaseSource, tmp_path: Path, method: Any
) -> None:
    pair = [make_adapter(base, tmp_path / name, seed=seed) for seed, name in enumerate("ab", 1)]
    merged = merge_together(pair, source, tmp_path / "both", method=method, density=0.7, seed=3)
    again = merge_together(pair, source, tmp_path / "again", method=method, density=0.7, seed=3)
    assert torch.equal(_logits(base, merged.folder), _logits(base, again.folder))
    with torch.inference_mode():
        assert not torch.allclose(_logits(base, merged.folder), _model(base)(_IDS).logits)


def test_wrong_merges_are_refused_and_leave_nothing_behind(
    base: Path, source: BaseSource, pair: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="one adapter alone"):
        merge_together(pair[:1], source, out)
    with pytest.raises(UsageError, match="3 weights for 2"):
        merge_together(pair, source, out, weights=[1, 1, 1])
    larger = make_adapter(base, tmp_path / "larger", r=8)
    with pytest.raises(Incompatible, match=r"equal ranks, these have \[4, 8\]"):
        merge_together([pair[0], larger], source, out, method="ties")
    stranger = make_tiny_base(tmp_path / "stranger", seed=9)
    save_manifest(Manifest(base=_pin(stranger)), larger)
    with pytest.raises(BaseMismatch, match="belongs to stranger"):
        merge_into_base(larger, source, out)
    assert not out.exists()


def test_command_prints_the_folder_and_warns_of_quantizing_again(
    base: Path, pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["merge", str(pair[1]), "--base", str(base), "--into-base", "--out", str(tmp_path / "whole")]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "whole")
    assert "quantizing this model again" in printed.err
    wrong = ["merge", *map(str, pair), "--base", str(base), "--weights", "a,b", "--out", str(tmp_path / "x")]
    assert run(wrong) == 2
    assert "are not numbers" in capsys.readouterr().err


def _pin(base: Path) -> BasePin:
    identity = identify_base(base, base_id=base.name)
    return BasePin(id=identity.id, fingerprint=identity.fingerprint)
