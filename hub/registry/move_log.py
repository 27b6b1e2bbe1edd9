"""The history of channels: one line a move, written with the move, never changed. Knows no rule about who may move."""

import time

from sqlalchemy import Select, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from loractl.hub import tables
from loractl.hub.actor import Actor
from loractl.hub.moments import iso
from loractl.hub.registry.records import Repo
from loractl.hub.wire import ChannelMove, MoveKind


async def log_move(
    connection: AsyncConnection,
    repo: Repo,
    name: str,
    kind: MoveKind,
    *,
    old: str | None,
    new: str | None,
    actor: Actor,
    reason: str,
    share: float | None = None,
) -> int:
    """Write one line and give its number."""
    row = await connection.execute(
        insert(tables.ref_log)
        .values(
            repo=repo.key,
            name=name,
            kind=kind,
            old_oid=old,
            new_oid=new,
            by=actor.name,
            at=time.time(),
            reason=reason,
            share=share,
        )
        .returning(tables.ref_log.c.id)
    )
    return int(row.scalar_one())


async def read_move(connection: AsyncConnection, repo: Repo, number: int) -> ChannelMove:
    """One line by its number."""
    return (await read_moves(connection, repo, select(tables.ref_log).where(tables.ref_log.c.id == number)))[0]


async def read_moves(connection: AsyncConnection, repo: Repo, query: "Select[tuple[object, ...]]") -> list[ChannelMove]:
    """The lines that a query over `ref_log` finds."""
    rows = (await connection.execute(query)).all()
    oids = {oid for row in rows for oid in (row.old_oid, row.new_oid) if oid is not None}
    table = tables.commit
    versions = {
        row.oid: row.version
        for row in await connection.execute(select(table.c.oid, table.c.version).where(table.c.oid.in_(oids)))
    }
    return [
        ChannelMove(
            id=row.id,
            repo_id=repo.repo_id,
            channel=row.name,
            kind=row.kind,
            old_commit=row.old_oid,
            new_commit=row.new_oid,
            old_version=versions.get(row.old_oid),
            new_version=versions.get(row.new_oid),
            by=row.by,
            at=iso(row.at),
            reason=row.reason,
            share=row.share,
        )
        for row in rows
    ]


async def places(connection: AsyncConnection, repo: Repo, name: str) -> list[tuple[str | None, str | None]]:
    """(old, new) of every move of a channel, oldest first; canaries move nothing."""
    table = tables.ref_log
    query = select(table.c.old_oid, table.c.new_oid).where(
        table.c.repo == repo.key, table.c.name == name, table.c.kind.not_in(("canary", "canary-end"))
    )
    return [(row.old_oid, row.new_oid) for row in (await connection.execute(query.order_by(table.c.id))).all()]


def previous(been: list[tuple[str | None, str | None]], now: str) -> str | None:
    """Where a channel was before it came to `now`, undoing each rollback with the move that it took back.

    `been`: (old, new) of every move, oldest first.
    """
    trail: list[str] = []
    for _, new in been:
        if new is None:
            trail.clear()
        elif new in trail:
            # Back at a place where it was: what came after is undone.
            del trail[trail.index(new) + 1 :]
        else:
            trail.append(new)
    if now in trail and trail.index(now) > 0:
        return trail[trail.index(now) - 1]
    return None
