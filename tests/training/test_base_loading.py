"""Loading a base: quantized as asked, counted truly, quiet, and by a name that is never a path."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from loractl.adapters.base_loading import load_base_model, memory_bytes, pick_dtype
from loractl.adapters.base_source import resolve_base
from loractl.adapters.errors import Incompatible, NotFound, UsageError
from loractl.adapters.manifest import Quantization
from tiny_models import make_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-base")


def test_base_source_names_the_folder_when_the_base_is_a_folder(base: Path) -> None:
    source = resolve_base(str(base))
    assert (source.folder, source.id, source.revision) == (base.resolve(), "tiny-base", None)


def test_base_source_names_repo_and_commit_when_the_folder_is_a_cache_snapshot(base: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--some--name" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(base)
    copied = tmp_path / "models--org--name" / "snapshots" / ("b" * 40)
    copied.mkdir(parents=True)
    (copied / "config.json").write_text((base / "config.json").read_text())
    assert (resolve_base(str(copied)).id, resolve_base(str(copied)).revision) == ("org/name", "b" * 40)


@pytest.mark.parametrize("text", ["/no/such/folder", "./nothing", "a/b/c"])
def test_base_source_says_not_found_when_a_path_leads_nowhere(text: str) -> None:
    with pytest.raises(NotFound, match="no such base folder"):
        resolve_base(text)


def test_base_source_refuses_a_revision_when_the_base_is_a_folder(base: Path) -> None:
    with pytest.raises(UsageError, match="has no revisions"):
        resolve_base(str(base), revision="main")


def test_base_equals_transformers_own_when_not_quantized(base: Path) -> None:
    ids = torch.arange(12)[None]
    ours = load_base_model(base, quantization="none", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize(("quantization", "bytes_each"), [("int8", 1.0), ("nf4", 0.5), ("none", 4.0)])
def test_memory_counts_linear_weights_by_their_width(base: Path, quantization: Quantization, bytes_each: float) -> None:
    model = load_base_model(base, quantization=quantization, dtype="float32")
    num_linear = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)
    sizes = memory_bytes(model)
    assert sizes["linear"] == num_linear * bytes_each
    assert sizes["embedding"] == 384 * 32 * 4  # the head is tied to it and counted once
    assert (sizes["scales"] > 0) == (quantization != "none")


def test_base_4bit_still_trains_when_it_was_evaluated_first(base: Path) -> None:
    model = load_base_model(base, quantization="nf4", dtype="bfloat16")
    hidden = torch.randn(1, 5, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        before = model(inputs_embeds=hidden).logits
    grown = hidden.clone().requires_grad_()
    model.train()(inputs_embeds=grown).logits.float().sum().backward()
    assert grown.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(inputs_embeds=hidden).logits, before, rtol=0, atol=0)


def test_base_says_nothing_when_an_8bit_layer_runs(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load_base_model(base, quantization="int8", dtype="bfloat16")
    with caplog.at_level(logging.WARNING), torch.no_grad():
        model(torch.arange(12)[None])
    assert [record.getMessage() for record in caplog.records] == []


def test_base_is_refused_with_its_reason_when_transformers_does_not_know_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(Incompatible, match="no_such_model"):
        load_base_model(tmp_path)


def test_dtype_is_refused_when_unknown() -> None:
    with pytest.raises(UsageError, match="unknown dtype"):
        pick_dtype("float8", device="cpu")  # type: ignore[arg-type]
