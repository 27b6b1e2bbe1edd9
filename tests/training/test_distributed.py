"""Two processes that train one adapter: the same result as one with the same rows a step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from loractl.adapters.errors import UsageError
from loractl.adapters.manifest import load_manifest
from loractl.adapters.training.distributed import World, read_world
from tiny_models import make_tiny_base

WORDS = ["quick", "brown", "fox", "jumps", "lazy", "dog", "film", "charm", "sense", "positive", "negative", "great"]


@pytest.mark.slow
@pytest.mark.e2e
def test_two_processes_give_the_result_of_one_with_the_same_rows_a_step(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base")
    data = tmp_path / "rows.jsonl"
    rows = [{"text": " ".join(WORDS[i % 5 : i % 7 + 5]), "label": WORDS[9 + i % 2]} for i in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["-m", "loractl.cli", "train", "--preset", "article", "--base", str(base), "--data", str(data)]
    common += ["--quantize", "none"]
    for setting in ("dtype=float32", "adapter.dropout=0", "train.learning_rate=1e-2", "data.eval_share=0.2"):
        common += ["--set", setting]
    launchers = {
        "one": [sys.executable],
        "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name, launcher in launchers.items():
        command = [*launcher, *common, "--out", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("sha256:") == 1
        if name == "two":
            assert '"num_processes": 2' in done.stderr
    one, two = (load_manifest(tmp_path / name) for name in launchers)
    assert one is not None
    assert two is not None
    for (_, ours), (_, theirs) in zip(one.loss_curve, two.loss_curve, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert one.metrics["eval_loss"] == pytest.approx(two.metrics["eval_loss"], abs=1e-4)
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in launchers]
    for key, tensor in weights[0].items():
        assert (tensor - weights[1][key]).abs().max() < 2e-3, key


@pytest.mark.parametrize(
    "environment", [{"PET_NNODES": "2"}, {"PET_NPROC_PER_NODE": "4", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "2"}]
)
def test_trap_cluster_settings_without_a_launcher_are_refused_not_trained_at_world_size_one(
    environment: dict[str, str],
) -> None:
    with pytest.raises(UsageError) as refused:
        read_world(environment)
    assert "torchrun" in (refused.value.hint or "")


def test_process_is_alone_when_nothing_says_otherwise() -> None:
    assert read_world({}) == World(0, 1)
    assert read_world({"RANK": "1", "WORLD_SIZE": "2", "PET_NPROC_PER_NODE": "2"}) == World(1, 2)
