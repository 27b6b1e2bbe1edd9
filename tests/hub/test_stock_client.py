"""What the unmodified Hugging Face client does against a live hub, with Xet and without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from live_hub import LiveHub
from loractl.adapters.digest import folder_digest

_PUSH = """
import sys
from huggingface_hub import HfApi
folder, repo = sys.argv[1:]
api = HfApi()
api.create_repo(repo, exist_ok=True)
print(api.upload_folder(folder_path=folder, repo_id=repo, commit_message="first").oid)
"""


def _push(hub: LiveHub, folder: Path, repo: str, *, xet: bool) -> str:
    """Push in a process of its own: the client decides about Xet when it is imported."""
    environment = dict(os.environ) | {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.admin}
    if not xet:
        environment["HF_HUB_DISABLE_XET"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", _PUSH, str(folder), repo],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])
def test_upload_folder_arrives_whole(hub: LiveHub, adapter: Path, tmp_path: Path, xet: bool) -> None:
    oid = _push(hub, adapter, "team/name", xet=xet)
    fetched = snapshot_download(
        "team/name", revision="v1", endpoint=hub.url, token=hub.admin, cache_dir=tmp_path / "cache"
    )
    assert folder_digest(Path(fetched)) == folder_digest(adapter)
    assert hub.api().model_info("team/name").sha == oid


@pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])
def test_upload_of_the_same_content_makes_no_commit(hub: LiveHub, adapter: Path, xet: bool) -> None:
    first = _push(hub, adapter, "team/name", xet=xet)
    assert _push(hub, adapter, "team/name", xet=xet) == first
    assert [tag.name for tag in hub.api().list_repo_refs("team/name").tags] == ["v1"]


def _commit(hub: LiveHub, repo: str, folder: Path, *, parent_commit: str | None = None) -> str:
    api = hub.api()
    api.create_repo(repo, exist_ok=True)
    files = [
        CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in folder.iterdir() if path.is_file()
    ]
    return str(api.create_commit(repo, operations=files, commit_message="push", parent_commit=parent_commit).oid)


def test_whoami_names_the_token(hub: LiveHub) -> None:
    assert hub.api().whoami()["name"] == "admin"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        hub.api("lch_not-a-token-of-this-hub").whoami()


def test_create_repo_again_is_refused_or_accepted_as_asked(hub: LiveHub) -> None:
    api = hub.api()
    assert str(api.create_repo("team/name")).endswith("team/name")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("team/name")
    api.create_repo("team/name", exist_ok=True)


def test_tags_and_branches_come_and_go(hub: LiveHub, adapter: Path) -> None:
    api = hub.api()
    oid = _commit(hub, "team/name", adapter)
    api.create_tag("team/name", tag="release-1", revision="main")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("team/name", tag="release-1")
    api.create_branch("team/name", branch="exp/1")
    refs = api.list_repo_refs("team/name")
    assert {branch.name: branch.target_commit for branch in refs.branches} == {"main": oid, "exp/1": oid}
    assert {tag.name for tag in refs.tags} == {"release-1", "v1"}
    assert api.model_info("team/name", revision="exp/1").sha == oid
    api.delete_branch("team/name", branch="exp/1")
    api.delete_tag("team/name", tag="release-1")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.delete_tag("team/name", tag="v1")


def test_commit_on_a_moved_parent_is_refused(hub: LiveHub, adapter: Path, other_adapter: Path) -> None:
    api = hub.api()
    api.create_repo("team/name")
    empty = api.model_info("team/name").sha
    _commit(hub, "team/name", adapter, parent_commit=empty)
    with pytest.raises(HfHubHTTPError, match="412"):
        _commit(hub, "team/name", other_adapter, parent_commit=empty)


def test_missing_things_raise_the_clients_own_errors(hub: LiveHub, adapter: Path) -> None:
    api = hub.api()
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("team/nothing")
    _commit(hub, "team/name", adapter)
    with pytest.raises(RevisionNotFoundError):
        api.model_info("team/name", revision="v9")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("team/name", "nothing.json")
    assert not api.file_exists("team/name", "adapter_model.bin")
    assert api.file_exists("team/name", "adapter_model.safetensors")


def test_pickle_is_refused_before_it_is_sent(hub: LiveHub, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04" + bytes(64))
    hub.api().create_repo("team/name")
    with pytest.raises(BadRequestError, match="E_PICKLE"):
        hub.api().upload_file(
            path_or_fileobj=tmp_path / "adapter_model.bin", path_in_repo="adapter_model.bin", repo_id="team/name"
        )


def test_tree_paths_and_commits_are_listed(hub: LiveHub, adapter: Path) -> None:
    api = hub.api()
    oid = _commit(hub, "team/name", adapter)
    names = {path.name for path in adapter.iterdir() if path.is_file()}
    assert set(api.list_repo_files("team/name")) == names
    found = api.get_paths_info("team/name", ["adapter_config.json", "absent.txt"])
    assert [one.path for one in found] == ["adapter_config.json"]
    assert next(iter(api.list_repo_commits("team/name"))).commit_id == oid
    assert [model.id for model in api.list_models(author="team")] == ["team/name"]


def test_peft_loads_a_version_by_its_name(hub: LiveHub, adapter: Path, tiny_base: Path) -> None:
    _commit(hub, "team/name", adapter)
    program = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "base, folder = sys.argv[1:]\n"
        "ids = torch.arange(3, 12)[None]\n"
        "def logits(source, **more):\n"
        "    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)\n"
        "    return PeftModel.from_pretrained(model, source, **more)(ids).logits\n"
        "assert torch.equal(logits('team/name', revision='v1'), logits(folder))\n"
    )
    environment = dict(os.environ) | {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.admin}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny_base), str(adapter)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
