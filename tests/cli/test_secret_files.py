"""Secrets come from files too: the server's and clients' hub token, and every setting of the hub."""

from pathlib import Path

import pytest

from loractl.adapters.errors import BadData, UsageError
from loractl.cli.context import hub_token
from loractl.cli.main import run
from loractl.hub.settings import read_settings


def test_token_of_a_client_is_read_from_the_file_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("lch_secret\n")
    monkeypatch.setenv("LORACTL_TOKEN_FILE", str(file))
    assert hub_token("http://hub") == "lch_secret"
    file.write_text("\n")
    with pytest.raises(BadData, match="is empty"):
        hub_token("http://hub")


def test_setting_of_the_hub_is_read_from_the_file_that_is_named(tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text("postgresql://a:b@c/d\n")
    assert read_settings({"LORACTL_HUB_DATABASE_URL_FILE": str(file)}).database_url == "postgresql://a:b@c/d"
    with pytest.raises(UsageError, match="both set"):
        read_settings({"LORACTL_HUB_PORT": "1", "LORACTL_HUB_PORT_FILE": str(file)})
    with pytest.raises(UsageError, match="LORACTL_HUB_DATABASE_URL_FILE"):
        read_settings({"LORACTL_HUB_DATABASE_URL_FILE": str(tmp_path / "none")})


def test_server_refuses_two_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["serve", str(tmp_path), "--token", "a", "--token-file", str(tmp_path / "t"), "--check-config"]
    assert run(words) == 2
    assert "both given" in capsys.readouterr().err


def test_migrate_brings_an_empty_folder_to_the_schema(tmp_path: Path) -> None:
    assert run(["hub", "migrate", "--root", str(tmp_path / "hub")]) == 0
    assert run(["hub", "token", "list", "--root", str(tmp_path / "hub")]) == 0
