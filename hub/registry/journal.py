"""What happened, written in the transaction in which it happened: the audit log for people, events for servers."""

import time
from typing import Any

import msgspec
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import AsyncConnection

from loractl.hub import tables
from loractl.hub.actor import Actor
from loractl.hub.registry.records import Repo

# Any number that nobody else locks by: it makes event numbers appear in the order in which they become visible.
_EVENT_LOCK = 7_260_715


async def record(
    connection: AsyncConnection, actor: Actor, action: str, *, target: str, detail: dict[str, Any] | None = None
) -> None:
    """Add one line to the audit log."""
    await connection.execute(
        insert(tables.audit).values(
            at=time.time(),
            actor=actor.name if actor.token_id is None else f"{actor.name}/{actor.token_id}",
            action=action,
            target=target,
            detail=msgspec.json.encode(detail or {}).decode(),
            request_id=actor.request_id,
        )
    )


async def emit(connection: AsyncConnection, kind: str, repo: Repo, payload: dict[str, Any]) -> int:
    """Add one event for servers and webhooks; returns its number. Call it last in a transaction."""
    if connection.dialect.name == "postgresql":
        # Without it a reader could see number 8 before 7 is committed, and never ask for 7 again.
        await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _EVENT_LOCK})
    row = await connection.execute(
        insert(tables.event)
        .values(
            kind=kind,
            repo_id=repo.repo_id,
            private=repo.private,
            at=time.time(),
            payload=msgspec.json.encode(payload).decode(),
        )
        .returning(tables.event.c.id)
    )
    return int(row.scalar_one())
