"""A hub of every earlier schema opens with all its rows; one of a later schema is left alone."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.script import ScriptDirectory

from live_postgres import LivePostgres
from loractl.adapters.errors import Incompatible
from loractl.hub.actor import SYSTEM
from loractl.hub.database import SQLITE_FILE, database_url, open_database
from loractl.hub.migrate import alembic_config
from loractl.hub.services import open_hub
from loractl.hub.settings import HubSettings

REVISIONS = [script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()][::-1]
OID, SHA, AT = "a" * 40, "b" * 64, 1_790_000_000.0
# What the first hub that ever was may hold, by table, parents first.
ROWS: dict[str, dict[str, Any]] = {
    "namespace": {"name": "team", "quota_bytes": 10**12, "created_at": AT},
    "repo": {
        "namespace": "team", "name": "name", "folded": "team/name", "private": True, "created_at": AT,
        "updated_at": AT, "num_downloads": 5, "next_version": 2,
    },
    "blob": {"sha256": SHA, "size_bytes": 3, "state": "ready", "touched_at": AT, "block_crc32": b"1234"},
    "repo_blob": {"repo": 1, "sha256": SHA},
    "commit_log": {
        "oid": OID, "repo": 1, "title": "first", "message": "", "author": "ada", "created_at": AT, "version": "v1",
        "tree_sha256": "c" * 64, "num_files": 1, "size_bytes": 3, "digest": "sha256:" + "d" * 64, "metrics": "{}",
        "tags": "[]", "adapter_size_bytes": 3,
    },
    "tree_entry": {
        "commit_oid": OID, "path": "a.txt", "sha256": SHA, "git_sha1": "e" * 40, "size_bytes": 3, "is_lfs": False,
    },
    "ref": {
        "repo": 1, "name": "main", "kind": "branch", "commit_oid": OID, "protected": False, "message": "",
        "updated_at": AT,
    },
    "ref_log": {"repo": 1, "name": "main", "kind": "push", "new_oid": OID, "by": "ada", "at": AT, "reason": ""},
    "event": {"at": AT, "kind": "channel.moved", "repo_id": "team/name", "private": True, "payload": "{}"},
    "audit": {"at": AT, "actor": "ada", "action": "commit", "target": "team/name", "detail": "{}", "request_id": ""},
}  # fmt: skip


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def settings(tmp_path: Path, request: pytest.FixtureRequest) -> HubSettings:
    url = None
    if request.param == "postgres":
        server: LivePostgres = request.getfixturevalue("postgres")
        url = server.create_database(f"old-{tmp_path.name}")
    return HubSettings(root=tmp_path, database_url=url)


async def _make_old(settings: HubSettings, revision: str) -> None:
    """A database of that schema, with a row in every table of the first."""

    def fill(connection: sa.Connection) -> None:
        command.upgrade(alembic_config(connection), revision)
        there = sa.MetaData()
        there.reflect(connection)
        for name, row in ROWS.items():
            columns = there.tables[name].columns
            connection.execute(sa.insert(there.tables[name]).values({k: v for k, v in row.items() if k in columns}))

    database = open_database(database_url(settings.root, settings.database_url))
    async with database.write() as connection:
        await connection.run_sync(fill)
    await database.close()


@pytest.mark.parametrize("revision", REVISIONS)
async def test_hub_of_an_earlier_schema_opens_with_all_that_it_held(settings: HubSettings, revision: str) -> None:
    await _make_old(settings, revision)
    async with open_hub(settings) as hub:
        async with hub.database.read() as connection:
            there = sa.MetaData()
            await connection.run_sync(there.reflect)
            for name, row in ROWS.items():
                found = (await connection.execute(sa.select(there.tables[name]))).mappings().first()
                assert found is not None, name
                assert {key: found[key] for key in row if key in found} == {k: v for k, v in row.items() if k in found}
        repo = await hub.repos.find("team/name", actor=SYSTEM)
        commit = await hub.revisions.commit(repo, "main")
        assert (commit.oid, commit.version) == (OID, "v1")
        await hub.repos.create("team", "another", private=False, actor=SYSTEM)


async def test_later_schema_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    settings = HubSettings(root=tmp_path)
    await _make_old(settings, "head")
    connection = sqlite3.connect(tmp_path / SQLITE_FILE)
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.commit()
    with pytest.raises(Incompatible, match="9999") as raised:
        async with open_hub(settings):
            raise AssertionError("it opened")
    assert raised.value.hint is not None
    assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("9999",)]
    connection.close()
