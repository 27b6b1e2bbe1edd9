"""`loractl push --gate` against a live hub: worse is refused before a byte is sent, better passes."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub.errors import RevisionNotFoundError

from live_hub import LiveHub
from loractl.adapters.manifest import Manifest, save_manifest
from loractl.cli.main import run
from pushing import push

_ROWS = "sha256:" + "1" * 64


def _measured(adapter: Path, folder: Path, accuracy: float, *, rows: str | None = _ROWS) -> Path:
    shutil.copytree(adapter, folder)
    on = {"eval_accuracy": rows} if rows else {}
    save_manifest(Manifest(metrics={"eval_accuracy": accuracy}, measured_on=on), folder)
    return folder


@pytest.fixture
def gated(folder_hub: LiveHub, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The end of a push's command line, up to what the gate asks."""
    monkeypatch.setenv("LORACTL_TOKEN", folder_hub.admin)
    return ["--hub", folder_hub.url, "--base", str(tiny_base), "--gate"]


def test_gate_refuses_a_worse_adapter_and_lets_a_better_one_pass(
    folder_hub: LiveHub,
    adapter: Path,
    other_adapter: Path,
    gated: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = _measured(adapter, tmp_path / "first", 0.8), _measured(other_adapter, tmp_path / "second", 0.7)
    assert run(["push", str(first), "team/name", *gated, "accuracy>=prev"]) == 0
    assert "points nowhere yet" in capsys.readouterr().err
    assert run(["push", str(second), "team/name", *gated, "accuracy>=prev"]) == 3
    assert "not accuracy 0.7 >= 0.8 (prev)" in capsys.readouterr().err
    assert run(["push", str(second), "team/name", *gated, "accuracy>=prod"]) == 7
    with pytest.raises(RevisionNotFoundError):
        _check_version(folder_hub, "v2")
    assert run(["push", str(second), "team/name", *gated, "accuracy>=0.6"]) == 0
    _check_version(folder_hub, "v2")


def _check_version(hub: LiveHub, version: str) -> None:
    hub.api().model_info("team/name", revision=version)


def test_gate_over_figures_of_other_rows_is_closed_even_to_a_better_one(
    folder_hub: LiveHub,
    adapter: Path,
    other_adapter: Path,
    gated: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["push", str(_measured(adapter, tmp_path / "first", 0.8)), "team/name", *gated, "accuracy>=prev"]) == 0
    for number, rows in enumerate(("sha256:" + "2" * 64, None)):
        mine = _measured(other_adapter, tmp_path / f"mine{number}", 0.9, rows=rows)
        capsys.readouterr()
        assert run(["push", str(mine), "team/name", *gated, "accuracy>=prev"]) == 3
        said = capsys.readouterr().err
        told = rows[:19] if rows else "that nothing tells of"
        assert f"the adapter's is of rows {told}, prev's of rows {_ROWS[:19]}" in said
        assert "loractl eval DIR --data FILE --record" in said


def test_gate_against_an_adapter_without_metrics_is_closed(
    folder_hub: LiveHub,
    adapter: Path,
    other_adapter: Path,
    gated: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    push(folder_hub, adapter)
    mine = _measured(other_adapter, tmp_path / "mine", 0.9)
    assert run(["push", str(mine), "team/name", *gated, "accuracy>=prev"]) == 3
    assert "prev has no metric accuracy" in capsys.readouterr().err
