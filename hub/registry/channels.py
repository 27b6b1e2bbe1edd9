"""Channels and tags: made, moved by compare-and-swap, moved back, with an append-only history. Knows no files."""

import re
import time
from typing import Literal

from msgspec import UNSET, UnsetType
from sqlalchemy import delete, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from loractl.adapters.errors import BadRequest, Conflict, NotAllowed, NotFound, RevisionNotFound
from loractl.adapters.reference import DEFAULT_REVISION, check_revision
from loractl.hub import tables
from loractl.hub.actor import Actor
from loractl.hub.database import Database
from loractl.hub.failpoints import reach
from loractl.hub.registry.canaries import end_canary, running_canaries, start_canary, take_back_canary
from loractl.hub.registry.journal import emit, record
from loractl.hub.registry.move_log import log_move, places, previous, read_move, read_moves
from loractl.hub.registry.records import Commit, Ref, Repo
from loractl.hub.registry.repos import lock_repo
from loractl.hub.registry.revisions import find_ref, resolve, revision_not_found
from loractl.hub.wire import ChannelMove, MoveKind, Promote, Rollback, Yank

_VERSION = re.compile(r"v[0-9]+")
_HEX = re.compile(r"[0-9a-f]{7,40}")


def check_ref_name(name: str, *, kind: Literal["channel", "tag"]) -> None:
    """Raise UsageError or BadRequest unless a person may give this name."""
    check_revision(name, whole=name)
    if _VERSION.fullmatch(name):
        raise BadRequest(
            f"{name!r} cannot be a {kind}: the hub names versions so, at each push", hint="choose a name such as prod"
        )
    if _HEX.fullmatch(name) or name.startswith("refs/"):
        raise BadRequest(f"{name!r} cannot be a {kind}: it looks like a commit or a full ref", hint="choose a word")


class Channels:
    """Moves the names that people and servers follow."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create_branch(self, repo: Repo, name: str, *, start: str | None, actor: Actor) -> None:
        """Make a channel at `start` (`main`); raises Conflict when the name is taken."""
        check_ref_name(name, kind="channel")
        async with self._database.write() as connection:
            await lock_repo(connection, repo.key)
            if await find_ref(connection, repo, name) is not None:
                raise Conflict(f"{repo.repo_id} has a channel or tag {name} already")
            commit = await resolve(connection, repo, start or DEFAULT_REVISION)
            await _put_ref(connection, repo, name, kind="branch", commit=commit)
            await log_move(connection, repo, name, "create", old=None, new=commit.oid, actor=actor, reason="")
            await record(connection, actor, "channel.create", target=repo.repo_id, detail={"channel": name})
            await emit(connection, "channel.moved", repo, _payload(name, "create", None, commit))

    async def delete_branch(self, repo: Repo, name: str, *, actor: Actor) -> None:
        """Remove a channel; `main` and protected ones stay. Raises RevisionNotFound."""
        async with self._database.write() as connection:
            await lock_repo(connection, repo.key)
            ref = await _branch(connection, repo, name)
            if name == DEFAULT_REVISION:
                raise BadRequest("main cannot be deleted", hint="promote another revision to it instead")
            _check_protected(repo, ref, actor)
            table = tables.ref
            await connection.execute(delete(table).where(table.c.repo == repo.key, table.c.name == name))
            await log_move(connection, repo, name, "delete", old=ref.commit_oid, new=None, actor=actor, reason="")
            await record(connection, actor, "channel.delete", target=repo.repo_id, detail={"channel": name})
            await emit(connection, "channel.moved", repo, _payload(name, "delete", ref.commit_oid, None))

    async def create_tag(self, repo: Repo, name: str, *, revision: str, message: str, actor: Actor) -> None:
        """Name a revision for good; raises Conflict when the name is taken, RevisionNotFound."""
        async with self._database.write() as connection:
            await lock_repo(connection, repo.key)
            if await find_ref(connection, repo, name) is not None:
                raise Conflict(f"{repo.repo_id} has a tag or channel {name} already")
            check_ref_name(name, kind="tag")
            commit = await resolve(connection, repo, revision)
            await _put_ref(connection, repo, name, kind="tag", commit=commit, message=message)
            await record(
                connection, actor, "tag.create", target=repo.repo_id, detail={"tag": name, "commit": commit.oid}
            )
            await emit(connection, "tag.created", repo, {"tag": name, "commit": commit.oid})

    async def delete_tag(self, repo: Repo, name: str, *, actor: Actor) -> None:
        """Remove a tag that a person made; versions stay. Raises RevisionNotFound."""
        async with self._database.write() as connection:
            await lock_repo(connection, repo.key)
            ref = await find_ref(connection, repo, name)
            if ref is None or ref.kind == "branch":
                raise revision_not_found(repo, name)
            if ref.kind == "version":
                raise NotAllowed(f"{name} is a version, which never changes", hint=f"`loractl yank` withdraws {name}")
            table = tables.ref
            await connection.execute(delete(table).where(table.c.repo == repo.key, table.c.name == name))
            await record(connection, actor, "tag.delete", target=repo.repo_id, detail={"tag": name})
            await emit(connection, "tag.deleted", repo, {"tag": name})

    async def protect(self, repo: Repo, name: str, *, protected: bool, actor: Actor) -> None:
        """Let only holders of the right `promote` move a channel, or everybody who may write."""
        async with self._database.write() as connection:
            await lock_repo(connection, repo.key)
            await _branch(connection, repo, name)
            table = tables.ref
            await connection.execute(
                update(table).where(table.c.repo == repo.key, table.c.name == name).values(protected=protected)
            )
            detail = {"channel": name, "protected": protected}
            await record(connection, actor, "channel.protect", target=repo.repo_id, detail=detail)
            await emit(connection, "channel.protected", repo, detail)

    async def yank(self, repo: Repo, wanted: Yank, *, actor: Actor) -> None:
        """Withdraw a commit with a reason, or take that back; it stays where it is."""
        table = tables.yank
        async with self._database.write() as connection:
            commit = await resolve(connection, repo, wanted.revision)
            await connection.execute(delete(table).where(table.c.commit_oid == commit.oid))
            if wanted.reason is not None:
                values = {"commit_oid": commit.oid, "reason": wanted.reason, "by": actor.name, "at": time.time()}
                await connection.execute(insert(table).values(**values))
            detail = {"commit": commit.oid, "version": commit.version, "reason": wanted.reason}
            kind = "yank" if wanted.reason is not None else "unyank"
            await record(connection, actor, kind, target=repo.repo_id, detail=detail)
            await emit(connection, f"version.{kind}ed", repo, detail)

    async def promote(self, repo: Repo, wanted: Promote, *, actor: Actor) -> ChannelMove:
        """Move a channel, or start a canary on it. Raises Conflict unless the channel is where `expected_old` says."""
        _check_may_move(repo, actor)
        name = wanted.channel
        async with self._database.write() as connection:
            await lock_repo(connection, repo.key)
            ref = await find_ref(connection, repo, name)
            if ref is None:
                check_ref_name(name, kind="channel")
            elif ref.kind != "branch":
                raise BadRequest(f"{name} is a {ref.kind}, which never moves", field="channel")
            else:
                _check_protected(repo, ref, actor)
            old = None if ref is None else ref.commit_oid
            _check_expected(name, old, wanted.expected_old)
            commit = await resolve(connection, repo, wanted.revision)
            if wanted.share is not UNSET:
                if ref is None:
                    raise RevisionNotFound(
                        f"{repo.repo_id} has no channel {name!r}",
                        hint="promote a first version to it, then try another",
                    )
                return await start_canary(
                    connection, repo, ref, commit, share=wanted.share, actor=actor, reason=wanted.reason
                )
            return await self._move(
                connection, repo, name, kind="promote", old=old, to=commit, actor=actor, reason=wanted.reason
            )

    async def rollback(self, repo: Repo, wanted: Rollback, *, actor: Actor) -> ChannelMove:
        """End a canary, or move a channel back. Raises Conflict as `promote`, NotFound when there is no way back."""
        _check_may_move(repo, actor)
        name = wanted.channel
        async with self._database.write() as connection:
            await lock_repo(connection, repo.key)
            ref = await _branch(connection, repo, name)
            _check_protected(repo, ref, actor)
            _check_expected(name, ref.commit_oid, wanted.expected_old)
            canary = (await running_canaries(connection, repo)).get(name)
            if canary is not None and wanted.to is None:
                return await take_back_canary(connection, repo, ref, canary, actor=actor, reason=wanted.reason)
            been = await places(connection, repo, name)
            if wanted.to is None:
                oid = previous(been, ref.commit_oid)
                if oid is None:
                    raise NotFound(f"channel {name} of {repo.repo_id} was never anywhere else", hint="promote instead")
                commit = await resolve(connection, repo, oid)
            else:
                commit = await resolve(connection, repo, wanted.to)
                if all(new != commit.oid for _, new in been):
                    raise NotFound(f"channel {name} was never at {wanted.to}", hint="promote moves it anywhere")
            return await self._move(
                connection,
                repo,
                name,
                kind="rollback",
                old=ref.commit_oid,
                to=commit,
                actor=actor,
                reason=wanted.reason,
            )

    async def _move(
        self,
        connection: AsyncConnection,
        repo: Repo,
        name: str,
        *,
        kind: MoveKind,
        old: str | None,
        to: Commit,
        actor: Actor,
        reason: str,
    ) -> ChannelMove:
        await end_canary(connection, repo, name)
        await _put_ref(connection, repo, name, kind="branch", commit=to)
        number = await log_move(connection, repo, name, kind, old=old, new=to.oid, actor=actor, reason=reason)
        detail = {"channel": name, "from": old, "to": to.oid, "reason": reason}
        await record(connection, actor, f"channel.{kind}", target=repo.repo_id, detail=detail)
        await emit(connection, "channel.moved", repo, _payload(name, kind, old, to))
        reach("promote-before-end")
        return await read_move(connection, repo, number)

    async def history(self, repo: Repo, channel: str | None, *, limit: int) -> list[ChannelMove]:
        """Moves of one channel or of all, newest first."""
        table = tables.ref_log
        query = select(table).where(table.c.repo == repo.key).order_by(table.c.id.desc()).limit(limit)
        if channel is not None:
            query = query.where(table.c.name == channel)
        async with self._database.read() as connection:
            moves = await read_moves(connection, repo, query)
            if not moves and channel is not None:
                raise RevisionNotFound(f"{repo.repo_id} has no channel {channel!r} and never had one")
            return moves


def _check_may_move(repo: Repo, actor: Actor) -> None:
    """Both rights move channels that are not protected."""
    if not actor.may("promote", repo.repo_id, private=True):
        actor.require("write", repo.repo_id, private=True)


def _check_protected(repo: Repo, ref: Ref, actor: Actor) -> None:
    if ref.protected and not actor.may("promote", repo.repo_id, private=True):
        raise NotAllowed(
            f"channel {ref.name} of {repo.repo_id} is protected", hint="moving it takes a token with the role promote"
        )


def _check_expected(name: str, old: str | None, expected: str | UnsetType | None) -> None:
    if expected is not UNSET and expected != old:
        at = "does not exist" if old is None else f"is at {old}"
        wanted = "not to exist" if expected is None else f"to be at {expected}"
        raise Conflict(
            f"channel {name} {at}; expected was {wanted}", hint="somebody else moved it: look at its history"
        )


async def _branch(connection: AsyncConnection, repo: Repo, name: str) -> Ref:
    ref = await find_ref(connection, repo, name)
    if ref is None or ref.kind != "branch":
        raise RevisionNotFound(f"{repo.repo_id} has no channel {name!r}", hint=f"`loractl history {repo.repo_id}`")
    return ref


async def _put_ref(
    connection: AsyncConnection,
    repo: Repo,
    name: str,
    *,
    kind: Literal["branch", "tag"],
    commit: Commit,
    message: str = "",
) -> None:
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    moved = {"commit_oid": commit.oid, "updated_at": time.time()}
    values = {"repo": repo.key, "name": name, "kind": kind, "protected": False, "message": message, **moved}
    await connection.execute(
        dialect.insert(tables.ref).values(**values).on_conflict_do_update(index_elements=["repo", "name"], set_=moved)
    )


def _payload(name: str, kind: MoveKind, old: str | None, new: Commit | None) -> dict[str, str | None]:
    """What followers of the event stream learn of a move."""
    return {
        "channel": name,
        "kind": kind,
        "old": old,
        "new": None if new is None else new.oid,
        "version": None if new is None else new.version,
        "digest": None if new is None else new.digest,
    }
