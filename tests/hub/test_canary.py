"""A canary on a channel: recorded, seen by servers, unseen by stock clients, ended by any move of the channel."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from huggingface_hub import hf_hub_download
from sqlalchemy import inspect

from live_hub import LiveHub
from loractl.adapters.digest import CONFIG_FILE, WEIGHTS_FILE, file_sha256
from loractl.adapters.errors import BadRequest
from loractl.adapters.reference import parse_reference
from loractl.hub.client import HubClient
from loractl.hub.database import database_url, open_database
from loractl.hub.migrate import alembic_config, migrate
from loractl.hub.tables import metadata
from pushing import push

_PLACE = "/api/loractl/v1/adapters/team/name"
_CANARY: dict[str, Any] = {"channel": "prod", "revision": "v2", "share": 0.05, "reason": "accuracy 0.94"}


@pytest.fixture
def commits(hub: LiveHub, adapter: Path, other_adapter: Path) -> tuple[str, str]:
    first, second = push(hub, adapter), push(hub, other_adapter)
    with hub.http() as http:
        http.post(f"{_PLACE}/promote", json={"channel": "prod", "revision": "v1"})
    return first, second


def test_canary_leaves_the_channel_and_is_in_its_history(hub: LiveHub, commits: tuple[str, str]) -> None:
    first, second = commits
    with hub.http() as http:
        move = http.post(f"{_PLACE}/promote", json=_CANARY).json()
        channels = {one["channel"]: one for one in http.get(_PLACE).json()["channels"]}
        newest = http.get(f"{_PLACE}/history", params={"channel": "prod"}).json()["moves"][0]
        events = http.get("/api/loractl/v1/events", params={"kind": "channel.canary"}).json()["events"]
    assert (move["kind"], move["share"], move["old_version"], move["new_version"]) == ("canary", 0.05, "v1", "v2")
    assert newest == move
    assert (move["by"], move["reason"]) == ("admin", "accuracy 0.94")
    assert channels["prod"]["commit"] == first
    assert (channels["prod"]["canary"]["commit"], channels["prod"]["canary"]["share"]) == (second, 0.05)
    assert channels["main"]["canary"] is None
    assert [(event["data"]["version"], event["data"]["share"]) for event in events] == [("v2", 0.05)]


def test_stock_client_still_gets_the_stable_revision(
    hub: LiveHub, commits: tuple[str, str], adapter: Path, tmp_path: Path
) -> None:
    with hub.http() as http:
        http.post(f"{_PLACE}/promote", json=_CANARY)
    assert hub.api().model_info("team/name", revision="prod").sha == commits[0]
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        path = hf_hub_download(
            "team/name", name, revision="prod", endpoint=hub.url, token=hub.admin, cache_dir=tmp_path
        )
        assert file_sha256(Path(path)) == file_sha256(adapter / name)


def test_rollback_ends_the_canary_and_then_moves_the_channel(hub: LiveHub, commits: tuple[str, str]) -> None:
    with hub.http() as http:
        http.post(f"{_PLACE}/promote", json={"channel": "prod", "revision": "v2"})
        http.post(f"{_PLACE}/promote", json=_CANARY | {"revision": "v1"})
        ended = http.post(f"{_PLACE}/rollback", json={"channel": "prod", "reason": "worse"}).json()
        assert http.get(_PLACE, params={"revision": "prod"}).json()["resolved"]["canary"] is None
        moved = http.post(f"{_PLACE}/rollback", json={"channel": "prod"}).json()
    assert (ended["kind"], ended["old_version"], ended["new_version"]) == ("canary-end", "v1", "v2")
    assert (moved["kind"], moved["new_commit"]) == ("rollback", commits[0])


def test_any_move_of_the_channel_ends_its_canary(
    hub: LiveHub, commits: tuple[str, str], adapter: Path, other_adapter: Path
) -> None:
    def resolved() -> Any:
        return http.get("/api/loractl/v1/resolve", params={"repo": "team/name", "revision": "prod"}).json()

    with hub.http() as http:
        http.post(f"{_PLACE}/promote", json=_CANARY)
        assert resolved()["canary"]["commit"] == commits[1]
        http.post(f"{_PLACE}/promote", json={"channel": "prod", "revision": "v2"})
        assert (resolved()["version"], resolved()["canary"]) == ("v2", None)
        http.post(f"{_PLACE}/promote", json=_CANARY | {"revision": "v1"})
        push(hub, adapter, channel="prod")
        assert (resolved()["version"], resolved()["canary"]) == ("v3", None)
        http.post(f"{_PLACE}/promote", json=_CANARY | {"revision": "v2"})
        assert http.delete("/api/models/team/name/branch/prod").is_success
        http.post(f"{_PLACE}/promote", json={"channel": "prod", "revision": "v1"})
        assert resolved()["canary"] is None


@pytest.mark.usefixtures("commits")
def test_canary_that_cannot_be_is_refused(hub: LiveHub) -> None:
    refused: list[tuple[dict[str, Any], int, str]] = [
        ({"share": 0}, 400, "share"),
        ({"share": 1}, 400, "share"),
        ({"share": "5%"}, 400, "share"),
        ({"revision": "v1"}, 400, "revision"),
        ({"revision": "v9"}, 404, "v9"),
        ({"channel": "nowhere"}, 404, "nowhere"),
        ({"expected_old": "0" * 40}, 409, "expected"),
    ]
    with hub.http() as http:
        for change, status, said in refused:
            answer = http.post(f"{_PLACE}/promote", json=_CANARY | change)
            assert (answer.status_code, said in answer.text) == (status, True), (change, answer.text)
        assert http.get(_PLACE, params={"revision": "prod"}).json()["resolved"]["canary"] is None


@pytest.mark.usefixtures("commits")
def test_canary_takes_the_rights_of_a_move(hub: LiveHub) -> None:
    with hub.http(hub.token("read")) as http:
        assert http.post(f"{_PLACE}/promote", json=_CANARY).status_code == 403
    with hub.http() as http:
        http.post(f"{_PLACE}/protect", json={"channel": "prod"})
    with hub.http(hub.token("write")) as http:
        assert http.post(f"{_PLACE}/promote", json=_CANARY).status_code == 403
    with hub.http(hub.token("promote")) as http:
        assert http.post(f"{_PLACE}/promote", json=_CANARY).status_code == 200


def test_client_starts_and_sees_a_canary(hub: LiveHub, commits: tuple[str, str]) -> None:
    prod, second = parse_reference("team/name@prod"), parse_reference("team/name@v2")
    with HubClient(hub.url, hub.admin) as client:
        client.promote(second, "prod", share=0.25)
        canary = client.resolve(prod).canary
        assert canary is not None
        assert (canary.share, canary.adapter) == (0.25, replace(client.resolve(second), revision="prod"))
        client.promote(second, "prod", share=0.5)
        assert client.show(prod).channels[1].canary.share == 0.5  # type: ignore[union-attr]
        with pytest.raises(BadRequest):
            client.promote(prod, "prod", share=0.5)
        client.rollback(prod, "prod")
        assert client.resolve(prod).canary is None
        assert client.resolve(prod).commit == commits[0]


@pytest.mark.usefixtures("commits")
def test_repo_with_a_canary_can_be_deleted(hub: LiveHub) -> None:
    with hub.http() as http:
        http.post(f"{_PLACE}/promote", json=_CANARY)
    hub.api().delete_repo("team/name")
    assert not hub.api().repo_exists("team/name")


def test_migrations_make_the_tables_that_the_code_knows(hub: LiveHub) -> None:
    async def differences() -> list[Any]:
        database = open_database(database_url(hub.settings.root, hub.settings.database_url))
        async with database.read() as connection:
            found = await connection.run_sync(lambda sync: compare_metadata(MigrationContext.configure(sync), metadata))
        await database.close()
        return list(found)

    named = [
        one for one in asyncio.run(differences()) if any(word in str(one) for word in ("canary", "share", "upkeep"))
    ]
    assert named == []


def test_database_of_the_version_before_is_brought_up(tmp_path: Path) -> None:
    async def upgrade() -> tuple[str | None, set[str]]:
        database = open_database(database_url(tmp_path, None))
        async with database.write() as connection:
            await connection.run_sync(lambda sync: command.upgrade(alembic_config(sync), "0002"))
        await migrate(database)
        async with database.read() as connection:
            version = await connection.run_sync(lambda sync: MigrationContext.configure(sync).get_current_revision())
            names = await connection.run_sync(lambda sync: set(inspect(sync).get_table_names()))
        await database.close()
        return version, names

    version, names = asyncio.run(upgrade())
    assert version == ScriptDirectory.from_config(alembic_config()).get_current_head()
    assert set(metadata.tables) <= names
