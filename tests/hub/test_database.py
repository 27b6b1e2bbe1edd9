"""Transactions of the hub when the task that runs them is cut off."""

import asyncio
import random
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import text

from loractl.hub.database import SQLITE_FILE, Database, database_url, open_database


async def _write_for_ever(database: Database) -> None:
    while True:
        async with database.write() as connection:
            await connection.execute(text("INSERT INTO kept VALUES (1), (2)"))
            await connection.execute(text("SELECT * FROM kept LIMIT 5"))


async def _cut_off(database: Database, after_s: float) -> list[BaseException | None]:
    tasks = [asyncio.create_task(_write_for_ever(database)) for _ in range(3)]
    await asyncio.sleep(after_s)
    for task in tasks:
        task.cancel()
    # Kept by the caller: their tracebacks hold whatever the tasks held.
    return await asyncio.gather(*tasks, return_exceptions=True)


async def test_cancelled_transaction_is_undone_whole_and_lets_the_next_write(tmp_path: Path) -> None:
    url = database_url(tmp_path, None)
    with sqlite3.connect(tmp_path / SQLITE_FILE) as plain:
        plain.execute("PRAGMA journal_mode=WAL")
        plain.execute("CREATE TABLE kept (number INTEGER)")
    plain.close()
    chance = random.Random(5)
    ends: list[BaseException | None] = []
    for _ in range(40):
        database = open_database(url)
        ends += await _cut_off(database, chance.random() * 0.02)
        await database.close()
        # As another process would come: it does not wait.
        other = sqlite3.connect(tmp_path / SQLITE_FILE, timeout=0.0, isolation_level=None)
        try:
            other.execute("BEGIN IMMEDIATE")
            assert other.execute("SELECT count(*) % 2 FROM kept").fetchone() == (0,)
        except sqlite3.OperationalError as error:
            pytest.fail(f"a cancelled task left its lock: {error}")
        finally:
            other.close()
    assert all(isinstance(end, asyncio.CancelledError) for end in ends)
