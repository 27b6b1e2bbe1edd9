"""Copies all rows of a hub's database into another, SQLite or PostgreSQL, in one snapshot. Knows no table's meaning."""

from typing import Any

from sqlalchemy import Integer, func, insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from loractl.hub import tables
from loractl.hub.database import Database

_BATCH = 1000


async def copy_tables(source: Database, target: Database) -> int:
    """Copy every table into a target that has the same schema and no rows; returns how many rows went over.

    All reads are of one moment, and all writes are one transaction.
    """
    num_rows = 0
    async with source.read() as reading, target.write() as writing:
        if not source.is_sqlite:
            await reading.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
        for table in tables.metadata.sorted_tables:
            found = await reading.stream(select(table))
            async for rows in found.mappings().partitions(_BATCH):
                await writing.execute(insert(table), [dict(row) for row in rows])
                num_rows += len(rows)
            if not target.is_sqlite:
                await _go_on_counting(writing, table)
    return num_rows


async def _go_on_counting(connection: AsyncConnection, table: Any) -> None:
    """Let PostgreSQL's own numbering begin after the numbers that came with the rows."""
    key = table.c.get("id")
    if key is None or not isinstance(key.type, Integer) or not key.autoincrement:
        return
    highest = (await connection.execute(select(func.max(key)))).scalar_one()
    if highest is not None:
        sequence = func.pg_get_serial_sequence(table.name, key.name)
        await connection.execute(select(func.setval(sequence, highest)))
