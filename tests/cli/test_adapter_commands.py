"""`loractl check` and the commands' answers without a hub."""

import json
from pathlib import Path

import pytest

from hostile_files import CONFIG, sound_config, sound_files
from loractl.cli.context import hub_token, profile_path
from loractl.cli.main import run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in sound_files().items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_check_prints_the_record_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(folder), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["verdict"] == "warned"
    assert "" in record["digests"]


def test_check_exits_with_3_when_the_hub_would_refuse(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / CONFIG).write_bytes(sound_config(r=8))
    assert run(["check", str(folder)]) == 3
    assert "E_AB" in capsys.readouterr().out


def test_push_without_a_pinned_base_is_refused_with_the_way_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["push", str(folder), "team/name"]) == 3
    assert "--base" in capsys.readouterr().err


def test_pull_from_nowhere_is_unreachable(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pull", "team/name", "--hub", "http://127.0.0.1:9"]) == 9
    assert "loractl hub serve" in capsys.readouterr().err


def test_profile_that_others_can_read_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    profile_path().parent.mkdir(parents=True)
    profile_path().write_text('{"token": "lrh_secret"}')
    profile_path().chmod(0o644)
    assert run(["list"]) == 8
    assert "chmod 600" in capsys.readouterr().err


def test_token_of_the_profile_goes_to_its_own_hub_alone() -> None:
    profile_path().parent.mkdir(parents=True)
    profile_path().write_text('{"hub": "http://hub.example", "token": "lrh_secret"}')
    profile_path().chmod(0o600)
    assert hub_token("http://hub.example") == "lrh_secret"
    assert hub_token("http://other.example") is None
