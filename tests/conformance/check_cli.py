"""The command `hf`, as a person types it, old and new."""

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, __version__

from wire import folder_bytes

_MAIN = "from huggingface_hub.cli.hf import main; main()"
_IS_OLD = __version__.startswith("0.")
# A table is cut to the width of a terminal.
_JSON = ("--format", "json")


def _hf(environment: dict[str, str], *arguments: str, fails: bool = False) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _MAIN, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_login_keeps_a_token_that_whoami_knows(client_environment: dict[str, str], token: str) -> None:
    environment = {key: value for key, value in client_environment.items() if key != "HF_TOKEN"}
    _hf(environment, "auth", "login", "--token", token)
    assert "admin" in _hf(environment, "auth", "whoami")
    _hf(environment, "auth", "logout")


def test_repo_is_made_filled_tagged_fetched_and_deleted(
    api: HfApi, client_environment: dict[str, str], namespace: str, adapter: Path, tmp_path: Path
) -> None:
    repo = f"{namespace}/by-hand"
    noun = "repo" if _IS_OLD else "repos"
    _hf(client_environment, noun, "create", repo)
    out = _hf(client_environment, "upload", repo, str(adapter), ".", "--commit-message", "by hand")
    assert repo in out
    (adapter / "notes.txt").write_text("more")
    _hf(client_environment, "upload", repo, str(adapter / "notes.txt"), "notes.txt")
    assert set(api.list_repo_files(repo)) == set(folder_bytes(adapter))
    _hf(client_environment, noun, "tag", "create", repo, "release-1")
    assert "release-1" in _hf(client_environment, noun, "tag", "list", repo)
    _hf(client_environment, "download", repo, "--revision", "release-1", "--local-dir", str(tmp_path / "here"))
    assert folder_bytes(tmp_path / "here") == folder_bytes(adapter)
    _hf(client_environment, "download", repo, "adapter_config.json", "--local-dir", str(tmp_path / "one"))
    assert list(folder_bytes(tmp_path / "one")) == ["adapter_config.json"]
    _hf(client_environment, noun, "tag", "delete", repo, "release-1", "--yes" if not _IS_OLD else "-y")
    assert [one.name for one in api.list_repo_refs(repo).tags] == ["v1", "v2"]
    if not _IS_OLD:
        _hf(client_environment, noun, "delete", repo, "--yes")
        assert not api.repo_exists(repo)


@pytest.mark.skipif(_IS_OLD, reason="huggingface_hub before 1.0 has no `hf models`")
def test_models_are_listed_and_shown(client_environment: dict[str, str], pushed: str, namespace: str) -> None:
    assert pushed in _hf(client_environment, "models", "ls", "--author", namespace, *_JSON)
    assert pushed in _hf(client_environment, "models", "info", pushed)


def test_reason_of_a_refusal_reaches_the_person(client_environment: dict[str, str], repo: str, adapter: Path) -> None:
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04" + bytes(64))
    assert "E_PICKLE" in _hf(client_environment, "upload", repo, str(adapter), fails=True)
    (adapter / "adapter_model.bin").unlink()
    config = (adapter / "adapter_config.json").read_text().replace('"r": 4', '"r": 8')
    (adapter / "adapter_config.json").write_text(config)
    assert "E_AB" in _hf(client_environment, "upload", repo, str(adapter), fails=True)
