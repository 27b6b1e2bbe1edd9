"""What happened, written in the transaction in which it happened: the audit log for people, events for servers.

kind               data                                                      tells
repo.created       -                                                         readers of the repo
repo.moved         from                                                      readers of the repo under its new name
repo.deleted       -                                                         who could read it
repo.visibility    private                                                   readers of the repo
version.created    version, commit, digest, channel                          readers of the repo
version.yanked     commit, version, reason     version.unyanked  likewise    readers of the repo
channel.moved      channel, kind, old, new, version, digest                  readers of the repo
channel.canary     channel, commit, version, digest, share; null: it ended   readers of the repo
channel.protected  channel, protected                                        readers of the repo
tag.created        tag, commit                 tag.deleted       tag         readers of the repo
token.created      id, name                    token.revoked     id, name    admins of the hub
"""

import time
from typing import Any

import msgspec
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import AsyncConnection

from loractl.hub import tables
from loractl.hub.actor import Actor
from loractl.hub.registry.outbox import enqueue
from loractl.hub.registry.records import Repo

KINDS = (
    "repo.created",
    "repo.moved",
    "repo.deleted",
    "repo.visibility",
    "version.created",
    "version.yanked",
    "version.unyanked",
    "channel.moved",
    "channel.canary",
    "channel.protected",
    "tag.created",
    "tag.deleted",
    "token.created",
    "token.revoked",
)

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


async def emit(connection: AsyncConnection, kind: str, repo: Repo | None, payload: dict[str, Any]) -> int:
    """Add one event for servers and webhooks; returns its number. Call it last in a transaction."""
    assert kind in KINDS, kind
    if connection.dialect.name == "postgresql":
        # Without it a reader could see number 8 before 7 is committed, and never ask for 7 again.
        await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _EVENT_LOCK})
    row = await connection.execute(
        insert(tables.event)
        .values(
            kind=kind,
            repo=None if repo is None else repo.key,
            repo_id="" if repo is None else repo.repo_id,
            private=repo is None or repo.private,
            at=time.time(),
            payload=msgspec.json.encode(payload).decode(),
        )
        .returning(tables.event.c.id)
    )
    number = int(row.scalar_one())
    await enqueue(connection, number, kind, "" if repo is None else repo.repo_id)
    return number
