"""How torch's threads wait for each other once a command has begun, in OpenMP's own words."""

import os
import subprocess
import sys

import pytest

from loractl.cli.main import run

_COUNT = "GOMP_SPINCOUNT"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP is what torch brings on Linux")
def test_threads_that_wait_sleep_soon() -> None:
    code = "from loractl.cli.main import run; run(['--help']); import torch"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment["OMP_DISPLAY_ENV"] = "verbose"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert f"{_COUNT} = '1000'" in done.stderr


@pytest.mark.parametrize("chosen", [{_COUNT: "7"}, {"OMP_WAIT_POLICY": "active"}], ids=["count", "policy"])
def test_operator_decides_otherwise(chosen: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_COUNT, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    assert run(["--help"]) == 0
    assert os.environ.get(_COUNT) == chosen.get(_COUNT)
