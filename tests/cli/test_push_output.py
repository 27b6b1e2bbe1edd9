"""What `push` and `pull` print where nobody watches: data on stdout, no progress bars on stderr."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from live_hub import live_hub
from loractl.adapters.manifest import BasePin, Manifest, save_manifest
from tiny_models import make_adapter, make_tiny_base

pytestmark = pytest.mark.slow


def test_push_and_pull_into_a_pipe_draw_no_bars(tmp_path: Path) -> None:
    adapter = make_adapter(make_tiny_base(tmp_path / "base"), tmp_path / "adapter", seed=1)
    save_manifest(Manifest(base=BasePin(id="tiny", fingerprint="sha256:" + "0" * 64)), adapter)
    with live_hub(tmp_path / "hub") as hub:
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
        environment |= {"LORACTL_HUB": hub.url, "LORACTL_TOKEN": hub.admin, "LORACTL_CACHE": str(tmp_path / "cache")}
        for command in (["push", str(adapter), "team/name"], ["pull", "team/name@v1", "--out", str(tmp_path / "out")]):
            done = subprocess.run(
                [sys.executable, "-m", "loractl.cli", *command],
                env=environment, capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert "\r" not in done.stderr
            assert "%" not in done.stderr
