"""The bench of a card runs from end to end without one, so that whoever has a card does not find its typos."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "tests" / "bench" / "bench_cuda.py"


@pytest.mark.slow
def test_every_section_runs_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run", "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests" / "support")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["checks"]
    assert all(check["ok"] for check in found["checks"]), found["checks"]
    assert found["skipped"] == []
    aims = [row["aim"] for row in found["figures"]]
    for aim in (">= 0.6", ">= 0.92", ">= 0.97", ">= 20", ">= 1.0", ">= 1.3", "<= 0.56", "<= 1.1", ">= 0.9", "<= 0.8"):
        assert aim in aims, aim
    assert "| first token, adapter on the host / resident, s |" in done.stdout
