"""gc, fsck and the operator's commands on a real store."""

import asyncio
import re
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError
from sqlalchemy import update

from live_hub import LiveHub, live_hub
from loractl.adapters.digest import file_sha256
from loractl.adapters.errors import BadData, BlobMissing
from loractl.cli.hub_commands import hub as hub_group
from loractl.hub import scheduled_gc, tables
from loractl.hub.registry.records import UpkeepKind
from loractl.hub.run import check_store, collect_garbage
from loractl.hub.services import open_hub


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


def test_running_hub_collects_by_itself_once_a_period(tmp_path: Path, adapter: Path) -> None:
    with live_hub(tmp_path / "hub", gc_every_s=0.5, gc_grace_s=0.0) as hub:
        _push(hub, adapter, "team/goes")
        hub.api().delete_repo("team/goes")
        deadline = time.monotonic() + 60.0
        while time.monotonic() < deadline and _are_there(hub, adapter):
            time.sleep(0.1)
        assert not _are_there(hub, adapter)
        with hub.http() as client:  # a run is noted once its blobs are gone
            while not re.search(r"loractl_hub_gc_runs_total\{[^}]*\} [1-9]", client.get("/metrics").text):
                assert time.monotonic() < deadline
                time.sleep(0.1)


@pytest.mark.parametrize(("last_run_s_ago", "collects"), [(7200.0, True), (60.0, False)])
def test_period_counts_from_the_last_run_whoever_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: Path, last_run_s_ago: float, collects: bool
) -> None:
    monkeypatch.setattr(scheduled_gc, "_LONGEST_SPREAD_S", 0.0)
    with live_hub(tmp_path / "hub", gc_every_s=0.0) as hub:
        _push(hub, adapter, "team/goes")
        hub.api().delete_repo("team/goes")
        asyncio.run(_note_gc(hub, last_run_s_ago))
    with live_hub(tmp_path / "hub", gc_every_s=3600.0, gc_grace_s=0.0) as hub:
        deadline = time.monotonic() + (60.0 if collects else 1.0)
        while time.monotonic() < deadline and _are_there(hub, adapter):
            time.sleep(0.1)
        assert _are_there(hub, adapter) is not collects


def test_runs_of_gc_at_the_same_moment_share_the_work(hub: LiveHub, adapter: Path, other_adapter: Path) -> None:
    async def collect_thrice() -> int:
        runs = (collect_garbage(hub.settings, grace_s=0.0) for _ in range(3))
        return sum(done.num_blobs for done in await asyncio.gather(*runs))

    _push(hub, other_adapter, "team/stays")
    before = asyncio.run(check_store(hub.settings, read_data=False)).num_blobs
    _push(hub, adapter, "team/goes")
    after = asyncio.run(check_store(hub.settings, read_data=False)).num_blobs
    hub.api().delete_repo("team/goes")
    assert asyncio.run(collect_thrice()) == after - before
    assert asyncio.run(check_store(hub.settings, read_data=True)).is_sound


async def _note_gc(hub: LiveHub, seconds_ago: float) -> None:
    async with open_hub(hub.settings) as opened:
        await opened.upkeep.note(UpkeepKind.GC, succeeded=True)
        async with opened.database.write() as connection:
            await connection.execute(update(tables.upkeep).values(at=time.time() - seconds_ago))


def _are_there(hub: LiveHub, adapter: Path) -> bool:
    try:
        return bool(hub.blob_bytes(file_sha256(adapter / "adapter_model.safetensors")))
    except BlobMissing:
        return False


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
