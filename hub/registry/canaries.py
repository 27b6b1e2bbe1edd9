"""Canaries: a second revision for a share of a channel's callers. The channel itself stays. Knows no route.

Whoever moves the channel ends its canary: what was tried is promoted, or something else came.
"""

import time

from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from loractl.adapters.errors import BadRequest
from loractl.hub import tables
from loractl.hub.actor import Actor
from loractl.hub.moments import iso
from loractl.hub.registry.journal import emit, record
from loractl.hub.registry.move_log import log_move, read_move
from loractl.hub.registry.records import Commit, Ref, Repo, RunningCanary, commit_of
from loractl.hub.wire import Canary, ChannelMove


async def running_canaries(connection: AsyncConnection, repo: Repo) -> dict[str, RunningCanary]:
    """The canaries of a repo, by channel."""
    table, commit = tables.canary, tables.commit
    query = (
        select(commit, table.c.name, table.c.share, table.c.by, table.c.at, table.c.reason)
        .select_from(table.join(commit, table.c.commit_oid == commit.c.oid))
        .where(table.c.repo == repo.key)
    )
    return {
        row.name: RunningCanary(row.name, commit_of(row), row.share, row.by, row.at, row.reason)
        for row in (await connection.execute(query)).all()
    }


async def start_canary(
    connection: AsyncConnection,
    repo: Repo,
    ref: Ref,
    commit: Commit,
    *,
    share: float,
    actor: Actor,
    reason: str,
) -> ChannelMove:
    """Start a canary, or change its revision and share; raises BadRequest where it cannot stand beside the channel."""
    await _put(connection, repo, ref, commit, share=share, actor=actor, reason=reason)
    number = await log_move(
        connection,
        repo,
        ref.name,
        "canary",
        old=ref.commit_oid,
        new=commit.oid,
        actor=actor,
        reason=reason,
        share=share,
    )
    told = {"channel": ref.name, "commit": commit.oid, "version": commit.version, "digest": commit.digest}
    detail = told | {"share": share, "reason": reason}
    await record(connection, actor, "channel.canary", target=repo.repo_id, detail=detail)
    await emit(connection, "channel.canary", repo, told | {"share": share})
    return await read_move(connection, repo, number)


async def take_back_canary(
    connection: AsyncConnection,
    repo: Repo,
    ref: Ref,
    canary: RunningCanary,
    *,
    actor: Actor,
    reason: str,
) -> ChannelMove:
    """End a canary by a person's wish; its callers get what the channel points at."""
    await end_canary(connection, repo, ref.name)
    number = await log_move(
        connection,
        repo,
        ref.name,
        "canary-end",
        old=canary.commit.oid,
        new=ref.commit_oid,
        actor=actor,
        reason=reason,
    )
    detail = {"channel": ref.name, "commit": None, "version": None, "digest": None, "share": None}
    ended = {"channel": ref.name, "from": canary.commit.oid, "reason": reason}
    await record(connection, actor, "channel.canary-end", target=repo.repo_id, detail=ended)
    await emit(connection, "channel.canary", repo, detail)
    return await read_move(connection, repo, number)


async def _put(
    connection: AsyncConnection, repo: Repo, ref: Ref, commit: Commit, *, share: float, actor: Actor, reason: str
) -> None:
    stable = (await connection.execute(select(tables.commit).where(tables.commit.c.oid == ref.commit_oid))).one()
    if commit.oid == ref.commit_oid:
        raise BadRequest(
            f"{ref.name} is at {commit.version or commit.oid} already",
            hint="a canary is another version",
            field="revision",
        )
    if commit.digest is None:
        raise BadRequest(f"{commit.oid[:12]} holds no complete adapter", field="revision")
    pins = {stable.base_fingerprint, commit.base_fingerprint} - {None}
    if len(pins) > 1:
        raise BadRequest(
            f"{commit.version or commit.oid} belongs to another base than what {ref.name} serves",
            hint="a canary shares its channel's base: move the channel instead",
            field="revision",
        )
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    values = {"commit_oid": commit.oid, "share": share, "by": actor.name, "at": time.time(), "reason": reason}
    await connection.execute(
        dialect.insert(tables.canary)
        .values(repo=repo.key, name=ref.name, **values)
        .on_conflict_do_update(index_elements=["repo", "name"], set_=values)
    )


async def end_canary(connection: AsyncConnection, repo: Repo, name: str) -> None:
    """Take a channel's canary away, if it has one."""
    table = tables.canary
    await connection.execute(delete(table).where(table.c.repo == repo.key, table.c.name == name))


def canary_view(canary: RunningCanary | None) -> Canary | None:
    """As it goes over the wire."""
    if canary is None:
        return None
    commit = canary.commit
    return Canary(
        share=canary.share,
        commit=commit.oid,
        digest=commit.digest,
        version=commit.version,
        base_id=commit.base_id,
        base_fingerprint=commit.base_fingerprint,
        rank=commit.rank,
        size_bytes=commit.size_bytes,
        by=canary.by,
        at=iso(canary.at),
        reason=canary.reason,
    )
