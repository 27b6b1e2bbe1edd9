"""Reads the audit log, oldest first; the database itself lets nobody change or remove a line. Writes nothing."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec
from sqlalchemy import select

from loractl.hub import tables
from loractl.hub.admin_wire import AuditEntry
from loractl.hub.database import Database
from loractl.hub.moments import iso

_BATCH = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFilter:
    """Which lines; every part that is given must hold."""

    after: int = 0
    """Only lines with a higher number: an export goes on where the last one ended."""
    since: float | None = None
    actor: str | None = None
    """The name of a token."""
    action: str | None = None
    target: str | None = None
    limit: int | None = None


class AuditLog:
    """The append-only record of who did what."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def entries(self, wanted: AuditFilter) -> AsyncIterator[AuditEntry]:
        """Lines in their order, read in batches so that a long log needs little memory."""
        table = tables.audit
        after, num_left = wanted.after, wanted.limit
        while num_left is None or num_left > 0:
            query = select(table).where(table.c.id > after).order_by(table.c.id)
            if wanted.since is not None:
                query = query.where(table.c.at >= wanted.since)
            if wanted.actor is not None:
                name = table.c.actor
                query = query.where((name == wanted.actor) | name.startswith(f"{wanted.actor}/", autoescape=True))
            if wanted.action is not None:
                query = query.where(table.c.action == wanted.action)
            if wanted.target is not None:
                query = query.where(table.c.target == wanted.target)
            size = _BATCH if num_left is None else min(_BATCH, num_left)
            async with self._database.read() as connection:
                rows = (await connection.execute(query.limit(size))).all()
            for row in rows:
                yield AuditEntry(
                    id=row.id,
                    at=iso(row.at),
                    actor=row.actor,
                    action=row.action,
                    target=row.target,
                    detail=msgspec.json.decode(row.detail, type=dict[str, object]),
                    request_id=row.request_id,
                )
            if len(rows) < size:
                return
            after = rows[-1].id
            num_left = None if num_left is None else num_left - len(rows)
