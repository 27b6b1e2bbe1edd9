"""Puts an event down for every webhook that wants it, in the transaction in which it happened. Sends nothing."""

import fnmatch
import time
from typing import Any

import msgspec
from sqlalchemy import Row, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from loractl.hub import tables

PENDING = "pending"


async def enqueue(connection: AsyncConnection, event: int, kind: str, repo_id: str) -> None:
    """Note one delivery per webhook; an empty `repo_id` is a change of the whole hub, for its admins alone."""
    hooks = (await connection.execute(select(tables.webhook).where(tables.webhook.c.active.is_(True)))).all()
    now = time.time()
    wanted = [
        {
            "webhook": hook.id,
            "event": event,
            "state": PENDING,
            "num_attempts": 0,
            "next_at": now,
            "created_at": now,
        }
        for hook in hooks
        if _wants(hook, kind, repo_id)
    ]
    if wanted:
        await connection.execute(insert(tables.delivery), wanted)


def _wants(hook: "Row[Any]", kind: str, repo_id: str) -> bool:
    kinds = msgspec.json.decode(hook.kinds, type=list[str])
    if kinds and kind not in kinds:
        return False
    if not repo_id:
        return bool(hook.pattern == "*" and hook.scope == "*")
    folded = repo_id.casefold()
    return all(fnmatch.fnmatchcase(folded, pattern.casefold()) for pattern in (hook.pattern, hook.scope))
