"""Reading what was committed: names of revisions made exact, trees, histories. Changes nothing."""

import re
from dataclasses import dataclass

from sqlalchemy import and_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from loractl.adapters.errors import RevisionNotFound
from loractl.hub import tables
from loractl.hub.blobs.store import StoredBlob
from loractl.hub.database import Database
from loractl.hub.registry.quotas import used_in
from loractl.hub.registry.records import Commit, Ref, Repo, TreeEntry, commit_of, entry_of, ref_of

_OID = re.compile(r"[0-9a-f]{40}")
_OID_PREFIX = re.compile(r"[0-9a-f]{7,39}")
_REF_PREFIXES = {"refs/heads/": ("branch",), "refs/tags/": ("tag", "version")}


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file of a commit and the blob behind it."""

    commit: Commit
    entry: TreeEntry
    blob: StoredBlob
    yanked: str | None


@dataclass(frozen=True, slots=True)
class MissingFile:
    """The commit in which a file was sought and is not; clients remember that."""

    commit: Commit


def revision_not_found(repo: Repo, revision: str) -> RevisionNotFound:
    return RevisionNotFound(
        f"{repo.repo_id} has no revision {revision!r}", hint=f"`loractl show {repo.repo_id}` lists them"
    )


async def find_ref(connection: AsyncConnection, repo: Repo, name: str) -> Ref | None:
    """A channel or tag by its exact name."""
    table = tables.ref
    row = (await connection.execute(select(table).where(table.c.repo == repo.key, table.c.name == name))).first()
    return None if row is None else ref_of(row)


async def resolve(connection: AsyncConnection, repo: Repo, revision: str) -> Commit:
    """Find the commit that a channel, tag, commit id or unique prefix of one means; raises RevisionNotFound."""
    kinds: tuple[str, ...] = ("branch", "tag", "version")
    name = revision
    for prefix, allowed in _REF_PREFIXES.items():
        if revision.startswith(prefix):
            name, kinds = revision.removeprefix(prefix), allowed
    ref, table = tables.ref, tables.commit
    joined = ref.join(table, ref.c.commit_oid == table.c.oid)
    query = select(table).select_from(joined).where(ref.c.repo == repo.key, ref.c.name == name, ref.c.kind.in_(kinds))
    row = (await connection.execute(query)).first()
    if row is not None:
        return commit_of(row)
    if _OID.fullmatch(revision):
        condition = table.c.oid == revision
    elif _OID_PREFIX.fullmatch(revision):
        condition = and_(table.c.oid >= revision, table.c.oid < revision + "g")
    else:
        raise revision_not_found(repo, revision)
    rows = (await connection.execute(select(table).where(condition, table.c.repo == repo.key).limit(2))).all()
    if len(rows) != 1:
        raise revision_not_found(repo, revision)
    return commit_of(rows[0])


async def read_tree(connection: AsyncConnection, commit_oid: str) -> list[TreeEntry]:
    """All files of a commit, by path."""
    table = tables.tree_entry
    query = select(table).where(table.c.commit_oid == commit_oid).order_by(table.c.path)
    return [entry_of(row) for row in (await connection.execute(query)).all()]


class Revisions:
    """Reads for the routes, each in one snapshot."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def commit(self, repo: Repo, revision: str) -> Commit:
        """Make a revision exact; raises RevisionNotFound."""
        async with self._database.read() as connection:
            return await resolve(connection, repo, revision)

    async def tree(self, repo: Repo, revision: str) -> tuple[Commit, list[TreeEntry]]:
        """A revision's commit and all its files; raises RevisionNotFound."""
        async with self._database.read() as connection:
            commit = await resolve(connection, repo, revision)
            return commit, await read_tree(connection, commit.oid)

    async def file(self, repo: Repo, revision: str, path: str) -> FoundFile | MissingFile:
        """One file, or the commit that lacks it; raises RevisionNotFound."""
        entries, blobs, yanks = tables.tree_entry, tables.blob, tables.yank
        async with self._database.read() as connection:
            commit = await resolve(connection, repo, revision)
            joined = entries.join(blobs, entries.c.sha256 == blobs.c.sha256).outerjoin(
                yanks, yanks.c.commit_oid == entries.c.commit_oid
            )
            query = (
                select(entries, blobs.c.block_crc32, yanks.c.reason)
                .select_from(joined)
                .where(entries.c.commit_oid == commit.oid, entries.c.path == path)
            )
            row = (await connection.execute(query)).first()
        if row is None:
            return MissingFile(commit)
        entry = entry_of(row)
        return FoundFile(commit, entry, StoredBlob(entry.sha256, entry.size_bytes, row.block_crc32), row.reason)

    async def refs(self, repo: Repo) -> list[Ref]:
        """All channels and tags, by name."""
        table = tables.ref
        async with self._database.read() as connection:
            query = select(table).where(table.c.repo == repo.key).order_by(table.c.name)
            return [ref_of(row) for row in (await connection.execute(query)).all()]

    async def log(self, repo: Repo, revision: str, *, limit: int) -> list[Commit]:
        """A revision and its ancestors, newest first."""
        table = tables.commit
        found: list[Commit] = []
        async with self._database.read() as connection:
            at = await resolve(connection, repo, revision)
            found.append(at)
            while at.parent is not None and len(found) < limit:
                row = (await connection.execute(select(table).where(table.c.oid == at.parent))).first()
                if row is None:
                    break
                at = commit_of(row)
                found.append(at)
        return found

    async def yank_reason(self, commit_oid: str) -> str | None:
        table = tables.yank
        async with self._database.read() as connection:
            query = select(table.c.reason).where(table.c.commit_oid == commit_oid)
            return (await connection.execute(query)).scalar_one_or_none()

    async def used_bytes(self, namespace: str) -> int:
        """What a namespace keeps: each blob that its repos name counts once."""
        async with self._database.read() as connection:
            return await used_in(connection, namespace)
