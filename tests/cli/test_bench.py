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


@pytest.mark.slow
def test_bench_prints_every_ratio_and_the_peers_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_tiny_base(tmp_path / "base")
    for seed in range(4):
        make_adapter(base, tmp_path / "adapters" / f"a{seed}", seed=seed)
    line = {"engine": "other", "requests": 4, "adapters": 2, "output_tokens_per_s": 2.0}
    (tmp_path / "peer.jsonl").write_text(f"some words\n{json.dumps(line)}\n")
    paths = ["--base", str(base), "--adapters", str(tmp_path / "adapters"), "--distinct", "4", "--max-rank", "8"]
    sizes = ["--requests", "4", "--prompt-tokens", "5", "--output-tokens", "6", "--runs", "1"]
    peer = ["--peer", f"other=cat {tmp_path / 'peer.jsonl'}"]
    assert run(["bench", "engine", *paths, *sizes, "--ratios", *peer]) == 0
    figures = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = " ".join(figure["figure"] for figure in figures)
    for part in ("2 distinct / identical", "bare products", "adapter on disk", "2 x slots", "Zipf", "unused", "dense"):
        assert part in names
    assert all(figure["ratio"] > 0 for figure in figures)
    beside = next(figure for figure in figures if figure["figure"].startswith("ours / other"))
    assert beside["other"] == 2.0


def test_bench_says_how_a_peer_is_named_when_it_has_no_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    options = ["--base", "none", "--adapters", str(tmp_path), "--distinct", "2", "--ratios", "--peer", "vllm"]
    assert run(["bench", "engine", *options]) == 2
    assert "no command" in capsys.readouterr().err
