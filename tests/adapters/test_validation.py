"""Every hostile file meets the check that is meant for it, and what PEFT saves passes."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hostile_files import CONFIG, HOSTILE, WEIGHTS, safetensors_bytes, sound_config, sound_files, weights
from loractl.adapters.digest import folder_digest
from loractl.adapters.validation import (
    FolderTree,
    MemoryTree,
    Policy,
    check_preupload,
    shapes_from_config,
    shapes_from_folder,
    validate_tree,
)
from tiny_models import make_adapter, make_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "base")


def test_sound_adapter_has_a_digest_and_no_rejection() -> None:
    record = validate_tree(MemoryTree(sound_files()))
    assert record.rejections == ()
    assert list(record.digests) == [""]


def test_hostile_file_in_a_folder_is_found_too() -> None:
    inner = {
        f"sub/{name}": data for name, data in (sound_files() | {WEIGHTS: weights(b=np.full((64, 4), np.inf))}).items()
    }
    record = validate_tree(MemoryTree(sound_files() | inner))
    assert {finding.code for finding in record.rejections} == {"E_NONFINITE"}


def test_spaces_after_a_header_are_legal() -> None:
    data = weights()
    length = int.from_bytes(data[:8], "little")
    padded = safetensors_bytes(data[8 : 8 + length] + b" " * 7, data[8 + length :])
    assert validate_tree(MemoryTree(sound_files() | {WEIGHTS: padded})).rejections == ()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_rejected_by_its_check(name: str) -> None:
    code, files = HOSTILE[name]
    record = validate_tree(MemoryTree(sound_files() | files()))
    assert code in {finding.code for finding in record.rejections}
    assert record.digests == {}
    assert record.verdict == "rejected"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True, "rank_pattern": {"q_proj": 2}},
        {"target_modules": "all-linear"},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"modules_to_save": ["lm_head"], "bias": "lora_only"},
        {"target_modules": r".*layers\.0.*q_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "use_rslora": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:.*embedding layers found.*", "ignore:.*tied.*")
def test_what_peft_saves_is_accepted(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = make_adapter(base, tmp_path / "adapter", **settings)
    record = validate_tree(FolderTree(folder), base=shapes_from_folder(base))
    assert record.rejections == ()
    assert record.digests == {"": folder_digest(folder)}


def test_shapes_from_config_equal_the_weights(base: Path) -> None:
    told = shapes_from_config(json.loads((base / "config.json").read_text()))
    held = shapes_from_folder(base)
    assert told is not None
    assert all(held.of(name) == shape for name, shape in told.weights.items())
    assert told.num_layers == held.num_layers


def test_adapter_of_another_size_is_rejected_when_the_base_is_known(base: Path) -> None:
    record = validate_tree(MemoryTree(sound_files()), base=shapes_from_folder(base))
    assert [finding.code for finding in record.rejections] == ["E_BASE_SHAPE"]


def test_missing_pin_is_rejected_when_the_policy_asks_for_one() -> None:
    record = validate_tree(MemoryTree(sound_files()), policy=Policy(base_pin="reject"))
    assert [finding.code for finding in record.rejections] == ["E_BASE_PIN"]


def test_other_base_than_the_line_of_versions_is_rejected() -> None:
    pin = {"base": {"id": "org/base", "fingerprint": "sha256:" + "a" * 64}}
    files = sound_files() | {"loractl.json": json.dumps(pin).encode()}
    assert validate_tree(MemoryTree(files), expected_fingerprint="sha256:" + "a" * 64).rejections == ()
    record = validate_tree(MemoryTree(files), expected_fingerprint="sha256:" + "b" * 64)
    assert [finding.code for finding in record.rejections] == ["E_BASE_PIN"]


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({WEIGHTS: weights(b=np.zeros((64, 4)))}, "W_ZERO_B"),
        ({CONFIG: sound_config(lora_alpha=80_000)}, "W_NORM"),
        ({CONFIG: sound_config(use_rslora=True, bias="all")}, "W_SERVE"),
        ({"README.md": b"no front matter"}, "W_CARD"),
        ({"tokenizer.json": b"{}"}, "E_CODE"),
        ({CONFIG: sound_config(peft_type="IA3")}, "E_CFG"),
    ],
)
def test_strange_adapter_is_kept_with_a_warning(files: dict[str, bytes], code: str) -> None:
    record = validate_tree(MemoryTree(sound_files() | files))
    assert record.rejections == ()
    assert code in {finding.code for finding in record.warnings}


def test_link_in_a_folder_is_rejected(tmp_path: Path) -> None:
    for name, data in sound_files().items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "link").symlink_to("/etc/passwd")
    assert [finding.code for finding in validate_tree(FolderTree(tmp_path)).rejections] == ["E_PATH"]


def test_preupload_refuses_a_pickle_before_its_bytes_come() -> None:
    findings = check_preupload("training_args.bin", size_bytes=10, sample=b"")
    assert [finding.code for finding in findings] == ["E_PICKLE"]
    assert check_preupload("sub dir/x+y%#ü.json", size_bytes=10, sample=b"{}") == []


def test_expression_without_end_is_stopped() -> None:
    _, files = HOSTILE["expression without end"]
    started = time.monotonic()
    validate_tree(MemoryTree(sound_files() | files()))
    assert time.monotonic() - started < 30  # a hang, not a speed
