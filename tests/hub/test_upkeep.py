"""gc, fsck and the operator's commands on a real store."""

import asyncio
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError

from live_hub import LiveHub
from loractl.adapters.digest import file_sha256
from loractl.adapters.errors import BadData, BlobMissing
from loractl.cli.hub_commands import hub as hub_group
from loractl.hub.run import check_store, collect_garbage


def _push(hub: LiveHub, folder: Path, repo: str) -> None:
    hub.api().create_repo(repo, exist_ok=True)
    files = [
        CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in folder.iterdir() if path.is_file()
    ]
    hub.api().create_commit(repo, operations=files, commit_message="push")


def test_gc_takes_what_a_deleted_repo_left_and_nothing_else(hub: LiveHub, adapter: Path, other_adapter: Path) -> None:
    _push(hub, adapter, "team/stays")
    _push(hub, other_adapter, "team/goes")
    hub.api().delete_repo("team/goes")
    done = asyncio.run(collect_garbage(hub.settings, grace_s=0.0))
    assert done.num_blobs > 0
    with pytest.raises(BlobMissing):
        hub.blob_bytes(file_sha256(other_adapter / "adapter_model.safetensors"))
    assert asyncio.run(check_store(hub.settings, read_data=True)).is_sound
    assert hub.api().file_exists("team/stays", "adapter_model.safetensors")


def test_gc_keeps_what_is_within_the_grace(hub: LiveHub, adapter: Path) -> None:
    _push(hub, adapter, "team/goes")
    hub.api().delete_repo("team/goes")
    assert asyncio.run(collect_garbage(hub.settings, grace_s=3600.0)).num_blobs == 0


def test_gc_beside_pushes_loses_nothing(hub: LiveHub, adapter: Path, other_adapter: Path) -> None:
    over = threading.Event()

    def collect() -> None:
        while not over.is_set():
            asyncio.run(collect_garbage(hub.settings, grace_s=0.0))

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        for number in range(4):
            _push(hub, (adapter, other_adapter)[number % 2], f"team/name{number % 3}")
            if number % 3 == 2:
                hub.api().delete_repo("team/name2")
    except HfHubHTTPError:
        # A push may be told that its upload was collected (grace is zero here); it must never be told a lie.
        pass
    finally:
        over.set()
        collector.join()
    assert asyncio.run(check_store(hub.settings, read_data=True)).is_sound


def test_fsck_finds_a_flipped_byte_and_a_lost_blob(hub: LiveHub, adapter: Path, other_adapter: Path) -> None:
    _push(hub, adapter, "team/name")
    _push(hub, other_adapter, "team/other")
    damaged = file_sha256(adapter / "adapter_model.safetensors")
    data = bytearray(hub.blob_bytes(damaged))
    data[-1] ^= 1
    hub.spoil_blob(damaged, bytes(data))
    lost = file_sha256(other_adapter / "adapter_model.safetensors")
    hub.lose_blob(lost)
    report = asyncio.run(check_store(hub.settings, read_data=True))
    assert (report.corrupt, report.missing) == ([damaged], [lost])
    result = CliRunner().invoke(hub_group, ["fsck"], env=hub.environment())
    assert isinstance(result.exception, BadData)


def test_token_commands_make_list_and_revoke(tmp_path: Path) -> None:
    root = ["--root", str(tmp_path / "hub")]
    made = CliRunner().invoke(hub_group, ["token", "create", *root, "--name", "ci", "--scope", "write"])
    assert made.exit_code == 0
    assert made.output.startswith("lch_")
    listed = CliRunner().invoke(hub_group, ["token", "list", *root])
    assert "ci" in listed.output
    assert made.output.strip() not in listed.output
    revoked = CliRunner().invoke(hub_group, ["token", "revoke", *root, listed.output.splitlines()[1].split()[0]])
    assert revoked.exit_code == 0


@pytest.mark.parametrize("flag", [[], ["--no-read-data"]])
def test_fsck_of_a_sound_hub_says_so(hub: LiveHub, adapter: Path, flag: list[str]) -> None:
    _push(hub, adapter, "team/name")
    result = CliRunner().invoke(hub_group, ["fsck", *flag], env=hub.environment())
    assert result.exit_code == 0
    assert str(len(list(adapter.iterdir()))) in result.output
