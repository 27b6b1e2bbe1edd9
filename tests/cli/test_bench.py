"""`loractl bench engine` on a tiny base: one line of JSON, and errors that say what is missing."""

import json
from pathlib import Path

import pytest

from loractl.cli.main import run
from tiny_models import make_adapter, make_tiny_base


def test_bench_prints_one_line_of_json_when_adapters_are_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_tiny_base(tmp_path / "base")
    for seed in range(2):
        make_adapter(base, tmp_path / "adapters" / f"a{seed}", seed=seed)
    sizes = ["--requests", "3", "--distinct", "2", "--prompt-tokens", "8", "--output-tokens", "4", "--max-rank", "8"]
    paths = ["--base", str(base), "--adapters", str(tmp_path / "adapters")]
    assert run(["bench", "engine", *paths, *sizes, "--quantize", "none"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.pop("output_tokens_per_s") > 0
    assert report == {
        "engine": "loractl none",
        "requests": 3,
        "adapters": 2,
        "prompt_tokens": 8,
        "output_tokens": 4,
    }


def test_bench_names_the_folder_when_it_holds_too_few_adapters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "engine", "--base", "none", "--adapters", str(tmp_path), "--distinct", "3"]) == 7
    assert "0 adapters" in capsys.readouterr().err
