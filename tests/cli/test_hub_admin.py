"""The commands of those who release from a hub and run it, against a live one."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from live_hub import LiveHub, live_hub
from loractl.cli.main import run
from pushing import push
from tiny_models import make_adapter, make_tiny_base


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("admin")
    return make_adapter(make_tiny_base(root / "base"), root / "adapter", seed=1)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveHub]:
    with live_hub(tmp_path / "hub") as running:
        monkeypatch.setenv("LORACTL_HUB", running.url)
        monkeypatch.setenv("LORACTL_TOKEN", running.admin)
        yield running


def test_yank_is_told_and_taken_back(hub: LiveHub, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push(hub, adapter)
    assert run(["yank", "team/name@v1", "-m", "wrong rows"]) == 0
    assert capsys.readouterr().out == "team/name@v1\n"
    assert run(["show", "team/name@v1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resolved"]["yanked"] == "wrong rows"
    assert run(["yank", "team/name@v1", "--undo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["yanked"] is None
    assert run(["yank", "team/name@v1"]) == 2
    assert run(["yank", "team/name", "-m", "which?"]) == 2


def test_moved_repo_answers_to_both_names(
    hub: LiveHub, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(hub, adapter)
    assert run(["move", "team/name", "lab/other"]) == 0
    assert capsys.readouterr().out == "lab/other\n"
    assert run(["show", "team/name", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["repo_id"] == "lab/other"
    assert run(["pull", "team/name@v1", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_delete_takes_a_confirmation(hub: LiveHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.api().create_repo("team/name")
    assert run(["delete", "team/name"]) == 2
    assert "--yes" in capsys.readouterr().err
    assert hub.api().repo_exists("team/name")
    assert run(["delete", "team/name", "--yes"]) == 0
    assert not hub.api().repo_exists("team/name")
    assert run(["delete", "team/name", "--yes"]) == 7


def test_quotas_are_set_and_listed(hub: LiveHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.api().create_repo("team/name")
    assert run(["hub", "quota", "set", "team", "--bytes", "1.5GB", "--repos", "3", "--json"]) == 0
    capsys.readouterr()
    assert run(["hub", "quota", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(one["namespace"], one["quota_bytes"], one["quota_repos"]) for one in listed] == [
        ("team", 1_500_000_000, 3)
    ]
    assert run(["hub", "quota", "set", "team", "--bytes", "much"]) == 2
    assert run(["hub", "quota", "set", "team"]) == 2


def test_audit_prints_json_lines(hub: LiveHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.api().create_repo("team/name")
    assert run(["hub", "audit", "--action", "repo.create"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["action"], line["target"]) for line in lines] == [("repo.create", "team/name")]


def test_audit_without_the_right_exits_with_8(
    hub: LiveHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORACTL_TOKEN", hub.token("read"))
    assert run(["hub", "audit"]) == 8
    assert "only an admin" in capsys.readouterr().err


def test_webhook_into_the_hubs_network_is_refused(hub: LiveHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["hub", "webhook", "create", f"{hub.url}/x"]) == 8
    assert "its network" in capsys.readouterr().err
    assert run(["hub", "webhook", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert run(["hub", "webhook", "test", "1"]) == 7
    assert run(["hub", "webhook", "deliveries", "1"]) == 7
    assert run(["hub", "webhook", "delete", "1"]) == 7
