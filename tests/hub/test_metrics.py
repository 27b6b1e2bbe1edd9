"""The hub's page of metrics: what it counts is what happened, and no label grows with what clients send."""

import asyncio
import re
from pathlib import Path

import pytest
from sqlalchemy.exc import DBAPIError

from live_hub import LiveHub
from loractl.adapters.digest import file_sha256
from loractl.adapters.errors import Unreachable
from loractl.hub.database import database_url, open_database
from loractl.hub.metrics import HubMetrics
from loractl.hub.run import check_store, collect_garbage
from pushing import push


def _page(hub: LiveHub) -> dict[str, float]:
    with hub.http("") as http:
        text = http.get("/metrics").text
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}


def _grown(before: dict[str, float], after: dict[str, float], name: str) -> float:
    return after.get(f"loractl_hub_{name}", 0.0) - before.get(f"loractl_hub_{name}", 0.0)


def test_gc_and_fsck_of_another_process_are_told(hub: LiveHub, adapter: Path) -> None:
    push(hub, adapter)
    before = _page(hub)
    assert before["loractl_hub_gc_last_success_timestamp_seconds"] == 0
    assert before["loractl_hub_scrub_last_success_timestamp_seconds"] == 0
    hub.api().delete_repo("team/name")
    done = asyncio.run(collect_garbage(hub.settings, grace_s=0.0))
    push(hub, adapter)
    report = asyncio.run(check_store(hub.settings, read_data=True))
    asyncio.run(check_store(hub.settings, read_data=False))
    after = _page(hub)
    assert _grown(before, after, 'gc_runs_total{result="ok"}') == 1
    assert _grown(before, after, "gc_deleted_blobs_total") == done.num_blobs > 0
    assert _grown(before, after, 'scrub_blobs_total{result="ok"}') == report.num_blobs > 0
    gc_at = after["loractl_hub_gc_last_success_timestamp_seconds"]
    scrub_at = after["loractl_hub_scrub_last_success_timestamp_seconds"]
    assert 1.7e9 < gc_at < scrub_at


def test_fsck_that_finds_damage_is_no_success(folder_hub: LiveHub, adapter: Path) -> None:
    push(folder_hub, adapter)
    before = _page(folder_hub)
    sha256 = file_sha256(adapter / "adapter_model.safetensors")
    path = next(folder_hub.settings.root.glob(f"blobs/sha256/*/*/{sha256}"))
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert asyncio.run(check_store(folder_hub.settings, read_data=True)).corrupt == [sha256]
    after = _page(folder_hub)
    assert _grown(before, after, 'scrub_blobs_total{result="corrupt"}') == 1
    assert _grown(before, after, "scrub_last_success_timestamp_seconds") == 0


def test_bytes_that_were_there_already_are_counted_once_a_push(hub: LiveHub, adapter: Path) -> None:
    push(hub, adapter, "team/first")
    before = _page(hub)
    push(hub, adapter, "team/second")
    num_bytes = sum(path.stat().st_size for path in adapter.iterdir())
    assert _grown(before, _page(hub), "blob_dedup_bytes_total") == num_bytes


def test_time_in_database_and_store_is_counted(hub: LiveHub, adapter: Path) -> None:
    before = _page(hub)
    push(hub, adapter)
    with hub.http() as http:
        assert http.get("/team/name/resolve/main/adapter_config.json").status_code == 200
    after = _page(hub)
    backend = "local" if hub.settings.blobs is None else "s3"
    for operation in ("receive", "publish", "read", "copy"):
        labels = f'{{backend="{backend}",op="{operation}"}}'
        assert _grown(before, after, f"storage_seconds_count{labels}") > 0, operation
        assert _grown(before, after, f"storage_seconds_sum{labels}") > 0, operation
    for operation in ("read", "write"):
        assert _grown(before, after, f'db_seconds_count{{op="{operation}"}}') > 0


def test_store_that_fails_is_counted_by_operation_and_code(folder_hub: LiveHub, adapter: Path) -> None:
    push(folder_hub, adapter)
    before = _page(folder_hub)
    sha256 = file_sha256(adapter / "adapter_config.json")
    path = next(folder_hub.settings.root.glob(f"blobs/sha256/*/*/{sha256}"))
    path.unlink()
    path.mkdir()
    with folder_hub.http() as http:
        assert http.get("/team/name/resolve/main/adapter_config.json").status_code == 503
    after = _page(folder_hub)
    assert _grown(before, after, 'storage_errors_total{code="UNREACHABLE",op="read"}') == 1
    assert sum(_grown(before, after, f'db_errors_total{{kind="{kind}"}}') for kind in ("connection", "busy")) == 0


async def test_what_a_database_throws_is_said_again_with_its_kind(tmp_path: Path) -> None:
    """SQLSTATEs that pass by themselves are 503; a fault of ours stays one."""

    class Thrown(Exception):
        def __init__(self, sqlstate: str) -> None:
            super().__init__("thrown")
            self.sqlstate = sqlstate

    metrics = HubMetrics()
    database = open_database(database_url(tmp_path, None), metrics=metrics)
    kinds = {"40P01": "serialization", "53300": "busy", "57P01": "connection", "08006": "connection"}
    for sqlstate in kinds:
        with pytest.raises(Unreachable):
            async with database.read():
                raise DBAPIError("SELECT 1", {}, Thrown(sqlstate))
    with pytest.raises(DBAPIError):
        async with database.read():
            raise DBAPIError("SELECT 1", {}, Thrown("42601"))
    await database.close()
    text = metrics.text().decode()
    for kind in set(kinds.values()):
        wanted = list(kinds.values()).count(kind)
        assert f'loractl_hub_db_errors_total{{kind="{kind}"}} {wanted}.0' in text


def test_names_that_clients_choose_never_become_labels(folder_hub: LiveHub) -> None:
    def shape() -> set[str]:
        return {re.sub(r'code="\d+"', "", name) for name in _page(folder_hub)}

    with folder_hub.http() as http:
        for path in ("/api/models/a/b", "/a/b/resolve/main/c", "/api/loractl/v1/adapters/a/b", "/xet/a/v1/shards"):
            http.get(path)
        shape()
        before = shape()
        for number in range(30):
            for path in (
                f"/api/models/t{number}/n",
                f"/t{number}/n/resolve/main/x{number}",
                f"/api/loractl/v1/adapters/t/n{number}",
                f"/nowhere/{number}/a/b/c",
            ):
                http.request("GET", path)
            http.request("PROPFIND", f"/api/models/t{number}/n")
    new = {name for name in shape() - before if not re.search(r'method="other"|route="unknown"', name)}
    assert new == set()
