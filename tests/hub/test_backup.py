"""A backup taken while a hub is used becomes a hub again, with everything that was acknowledged before it began."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from live_hub import LiveHub, live_hub
from loractl.adapters.errors import BadData, UsageError
from loractl.adapters.reference import AdapterRef
from loractl.cli.hub_commands import hub as hub_group
from loractl.hub.backup import back_up, restore
from loractl.hub.client import HubClient
from loractl.hub.run import check_store, collect_garbage
from loractl.hub.settings import HubSettings
from pushing import push


def _use(hub: LiveHub, adapter: Path, other: Path, over: threading.Event) -> None:
    """Push, promote, delete and collect until it is over; grace 0, so gc takes what a snapshot may still name."""
    number = 0
    while not over.is_set():
        number += 1
        try:
            push(hub, (adapter, other)[number % 2], f"busy/name{number % 2}")
            if number % 2:
                hub.api().delete_repo("busy/name1")
        except HfHubHTTPError:
            # Told that its upload was collected, which grace 0 allows.
            pass
        asyncio.run(collect_garbage(hub.settings, grace_s=0.0))


def test_backup_of_a_busy_hub_restores_to_a_sound_one(
    hub: LiveHub, adapter: Path, other_adapter: Path, tmp_path: Path
) -> None:
    push(hub, adapter, "team/name")
    push(hub, other_adapter, "team/name")
    with HubClient(hub.url, hub.admin) as client:
        client.promote(AdapterRef("team", "name", "v1"), "prod", reason="first")
        client.promote(AdapterRef("team", "name", "v2"), "prod", reason="second")
        before = client.show(AdapterRef("team", "name", "prod"))
        moves = client.history(AdapterRef("team", "name"))
    over = threading.Event()
    user = threading.Thread(target=_use, args=(hub, adapter, other_adapter, over))
    user.start()
    try:
        # The later ones find the folder of the first and take what is new.
        for _ in range(3):
            asyncio.run(back_up(hub.settings, tmp_path / "backup"))
    finally:
        over.set()
        user.join()
    fresh = HubSettings(root=tmp_path / "restored")
    assert asyncio.run(restore(fresh, tmp_path / "backup")).is_sound
    assert asyncio.run(check_store(fresh, read_data=True)).is_sound
    with live_hub(tmp_path / "restored") as again, HubClient(again.url, hub.admin) as client:
        # The tokens of the old hub work, and all is as it was.
        after = client.show(AdapterRef("team", "name", "prod"))
        assert (after.resolved, after.versions, after.files) == (before.resolved, before.versions, before.files)
        assert client.history(AdapterRef("team", "name")) == moves
        folder = snapshot_download(
            "team/name", revision="v1", endpoint=again.url, token=hub.admin, local_dir=tmp_path / "v1"
        )
        weights = "adapter_model.safetensors"
        assert (Path(folder) / weights).read_bytes() == (adapter / weights).read_bytes()
        # And it goes on from there.
        assert push(again, adapter, "team/name", token=hub.admin)
        assert client.show(AdapterRef("team", "name")).versions[0].version == "v3"


@pytest.mark.slow
def test_backup_of_a_folder_restores_to_postgres_and_s3(
    folder_hub: LiveHub, adapter: Path, other_adapter: Path, tmp_path: Path, postgres: Any, s3: Any
) -> None:
    push(folder_hub, adapter, "team/name")
    runner = CliRunner()
    saved = runner.invoke(hub_group, ["backup", str(tmp_path / "backup")], env=folder_hub.environment())
    assert saved.exit_code == 0, saved.output
    places = {"database_url": postgres.create_database("restored"), "blobs": s3.url("restored")}
    made = runner.invoke(
        hub_group,
        ["restore", str(tmp_path / "backup"), "--root", str(tmp_path / "moved"),
         "--database-url", places["database_url"], "--blobs", places["blobs"]],
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    with live_hub(tmp_path / "moved", **places) as moved:
        # New rows of every kind find numbers that no old row has.
        push(moved, other_adapter, "team/name", token=folder_hub.admin)
        push(moved, adapter, "team/other", token=folder_hub.admin)
        assert asyncio.run(check_store(moved.settings, read_data=True)).is_sound
    with pytest.raises(UsageError, match="holds a hub already"):
        asyncio.run(restore(moved.settings, tmp_path / "backup"))


def test_second_backup_copies_only_what_is_new_and_drops_what_is_gone(
    folder_hub: LiveHub, adapter: Path, other_adapter: Path, tmp_path: Path
) -> None:
    push(folder_hub, adapter, "team/stays")
    first = asyncio.run(back_up(folder_hub.settings, tmp_path / "backup"))
    assert first.num_copied == first.num_blobs
    push(folder_hub, other_adapter, "team/goes")
    assert asyncio.run(back_up(folder_hub.settings, tmp_path / "backup")).num_copied > 0
    folder_hub.api().delete_repo("team/goes")
    asyncio.run(collect_garbage(folder_hub.settings, grace_s=0.0))
    third = asyncio.run(back_up(folder_hub.settings, tmp_path / "backup"))
    assert (third.num_copied, third.num_blobs) == (0, first.num_blobs)
    assert sum(1 for path in (tmp_path / "backup" / "blobs").rglob("*") if path.is_file()) == first.num_blobs


def test_damage_is_found_before_there_is_a_hub(folder_hub: LiveHub, adapter: Path, tmp_path: Path) -> None:
    push(folder_hub, adapter, "team/name")
    backup = tmp_path / "backup"
    asyncio.run(back_up(folder_hub.settings, backup))
    weights = max(
        (path for path in (backup / "blobs").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(bytes(data))
    fresh = HubSettings(root=tmp_path / "restored")
    with pytest.raises(BadData, match="sha256"):
        asyncio.run(restore(fresh, backup))
    assert not (tmp_path / "restored" / "hub.sqlite3").exists()


def test_wrong_places_are_refused_with_what_to_do(folder_hub: LiveHub, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").write_text("not a backup")
    with pytest.raises(UsageError, match="is not empty"):
        asyncio.run(back_up(folder_hub.settings, tmp_path / "full"))
    with pytest.raises(UsageError, match="no hub in"):
        asyncio.run(back_up(HubSettings(root=tmp_path / "nothing"), tmp_path / "backup"))
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(UsageError, match="holds no backup"):
        asyncio.run(restore(HubSettings(root=tmp_path / "new"), tmp_path / "full"))
    asyncio.run(back_up(folder_hub.settings, tmp_path / "backup"))
    with pytest.raises(UsageError, match="holds a hub already"):
        asyncio.run(restore(folder_hub.settings, tmp_path / "backup"))
