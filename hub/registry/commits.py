"""Making commits: apply changes, have the tree checked, write commit, version and channel at once. Knows no HTTP."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from loractl.adapters.errors import AdapterInvalid, BadRequest, Conflict, EntryNotFound, NotAllowed, ParentMoved
from loractl.adapters.validation import Policy, ValidationRecord
from loractl.hub import tables
from loractl.hub.actor import Actor
from loractl.hub.blobs.store import BlobStore
from loractl.hub.checks import AdapterFacts, check_commit
from loractl.hub.database import Database
from loractl.hub.failpoints import reach
from loractl.hub.registry.canaries import end_canary
from loractl.hub.registry.journal import emit, record
from loractl.hub.registry.ledger import known_in
from loractl.hub.registry.quotas import Quotas
from loractl.hub.registry.records import Commit, Ref, Repo, TreeEntry, commit_of
from loractl.hub.registry.repos import lock_repo
from loractl.hub.registry.revisions import find_ref, read_tree, revision_not_found
from loractl.hub.registry.tree import commit_oid, tree_sha256

_NUM_TRIES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What a commit asks for; the blobs of `files` are in the ledger already."""

    title: str
    message: str = ""
    expected_parent: str | None = None
    """The head that the client saw; None: whatever is there."""
    files: tuple[TreeEntry, ...] = ()
    deleted_files: tuple[str, ...] = ()
    deleted_folders: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CommitResult:
    """The commit that now holds the content; `record` is None when nothing new was made."""

    commit: Commit
    record: ValidationRecord | None


@dataclass(frozen=True, slots=True)
class _Head:
    ref: Ref
    commit: Commit
    tree: list[TreeEntry]


class Commits:
    """Applies changes to a channel."""

    def __init__(self, database: Database, store: BlobStore, policy: Policy, quotas: Quotas) -> None:
        self._database = database
        self._store = store
        self._policy = policy
        self._quotas = quotas

    async def commit(self, repo: Repo, channel: str, changes: Changes, *, actor: Actor) -> CommitResult:
        """Commit to a channel, all or nothing; content equal to the head's makes no commit.

        Raises ParentMoved when the head is not `expected_parent`, AdapterInvalid with every rejection, EntryNotFound
        for a deleted file that is absent, BadRequest for a blob that this repo may not use, NotAllowed for a
        protected channel.
        """
        for _ in range(_NUM_TRIES):
            head = await self._head(repo, channel, actor=actor)
            entries = _applied(head.tree, changes)
            if tree_sha256(entries) == head.commit.tree_sha256:
                # Also what a client meets that asks again because the first answer was lost.
                return CommitResult(head.commit, None)
            if changes.expected_parent not in {None, head.commit.oid}:
                raise _parent_moved(channel, head.commit)
            await self._check_blobs(repo, changes)
            found, facts = await check_commit(
                self._store,
                entries,
                policy=self._policy,
                expected_fingerprint=head.commit.base_fingerprint,
            )
            if found.rejections:
                raise _rejected(found)
            commit = await self._write(repo, head, changes, entries, found=found, facts=facts, actor=actor)
            if commit is not None:
                return CommitResult(commit, found)
            if changes.expected_parent is not None:
                raise _parent_moved(channel, None)
        raise Conflict(f"{channel} moves too often to commit to it", hint="try again")

    async def _head(self, repo: Repo, channel: str, *, actor: Actor) -> _Head:
        async with self._database.read() as connection:
            ref = await find_ref(connection, repo, channel.removeprefix("refs/heads/"))
            if ref is None:
                raise revision_not_found(repo, channel)
            if ref.kind != "branch":
                raise BadRequest(
                    f"{channel} is a {ref.kind}, which never moves", hint="commit to a channel such as main"
                )
            if ref.protected and not actor.may("promote", repo.repo_id, private=True):
                raise NotAllowed(
                    f"channel {ref.name} of {repo.repo_id} is protected",
                    hint="push to another channel and have it promoted, or use a token with the role promote",
                )
            row = (await connection.execute(select(tables.commit).where(tables.commit.c.oid == ref.commit_oid))).one()
            return _Head(ref, commit_of(row), await read_tree(connection, ref.commit_oid))

    async def _check_blobs(self, repo: Repo, changes: Changes) -> None:
        async with self._database.write() as connection:
            await _require_blobs(connection, repo, changes.files)

    async def _write(
        self,
        repo: Repo,
        head: _Head,
        changes: Changes,
        entries: list[TreeEntry],
        *,
        found: ValidationRecord,
        facts: AdapterFacts,
        actor: Actor,
    ) -> Commit | None:
        """Write everything in one transaction; None when the channel moved since `head` was read."""
        async with self._database.write() as connection:
            locked = await lock_repo(connection, repo.key)
            ref = await find_ref(connection, repo, head.ref.name)
            if ref is None or ref.commit_oid != head.commit.oid:
                return None
            # Locks the rows until the end of this transaction: gc cannot take a blob between check and use.
            await _require_blobs(connection, repo, changes.files)
            await self._quotas.check_bytes(connection, locked, changes.files)
            now = time.time()
            version = f"v{locked.next_version}" if facts.digest is not None else None
            commit = await _insert_commit(
                connection,
                repo,
                head.commit.oid,
                changes,
                entries,
                facts=facts,
                version=version,
                author=actor.name,
                now=now,
            )
            await _insert_record(connection, commit, found, now)
            reach("commit-before-ref")
            await _move_refs(connection, locked, ref, commit, actor=actor, now=now)
            detail = {"commit": commit.oid, "channel": ref.name, "version": version, "digest": commit.digest}
            await record(connection, actor, "commit", target=repo.repo_id, detail=detail)
            payload = detail | {"old": head.commit.oid, "new": commit.oid, "kind": "push"}
            if version is not None:
                await emit(connection, "version.created", locked, detail)
            await emit(connection, "channel.moved", locked, payload)
            reach("commit-before-end")
        reach("commit-after-end")
        return commit


def _applied(tree: list[TreeEntry], changes: Changes) -> list[TreeEntry]:
    """The tree after the changes; raises EntryNotFound for a file or folder to delete that is not there."""
    files = {entry.path: entry for entry in tree}
    for path in changes.deleted_files:
        if path not in files and all(entry.path != path for entry in changes.files):
            raise EntryNotFound(f"A file with this name doesn't exist: {path}")
        files.pop(path, None)
    for folder in changes.deleted_folders:
        inside = [path for path in files if path.startswith(folder.strip("/") + "/")]
        if not inside:
            raise EntryNotFound(f"A folder with this name doesn't exist: {folder}")
        for path in inside:
            del files[path]
    files |= {entry.path: entry for entry in changes.files}
    return sorted(files.values(), key=lambda entry: entry.path)


async def _require_blobs(connection: AsyncConnection, repo: Repo, files: Iterable[TreeEntry]) -> None:
    wanted = {entry.sha256: entry for entry in files}
    known = await known_in(connection, repo, wanted)
    for sha256, entry in wanted.items():
        if known.get(sha256) != entry.size_bytes:
            raise BadRequest(
                f"{entry.path}: its content (sha256 {sha256}) was not uploaded to this repo",
                hint="upload it first; the upload may also have expired",
            )


async def _insert_commit(
    connection: AsyncConnection,
    repo: Repo,
    parent: str,
    changes: Changes,
    entries: list[TreeEntry],
    *,
    facts: AdapterFacts,
    version: str | None,
    author: str,
    now: float,
) -> Commit:
    tree = tree_sha256(entries)
    oid = commit_oid(
        repo=repo.key,
        parent=parent,
        tree=tree,
        title=changes.title,
        message=changes.message,
        author=author,
        created_at=now,
    )
    row = await connection.execute(
        insert(tables.commit)
        .values(
            oid=oid,
            repo=repo.key,
            parent=parent,
            title=changes.title,
            message=changes.message,
            author=author,
            created_at=now,
            tree_sha256=tree,
            num_files=len(entries),
            size_bytes=sum(entry.size_bytes for entry in entries),
            version=version,
            digest=facts.digest,
            adapter_size_bytes=facts.adapter_size_bytes,
            base_id=facts.base_id,
            base_fingerprint=facts.base_fingerprint,
            task=facts.task,
            rank=facts.rank,
            metrics=msgspec.json.encode(facts.metrics).decode(),
            tags=msgspec.json.encode(facts.tags).decode(),
        )
        .returning(tables.commit)
    )
    commit = commit_of(row.one())
    if entries:
        await connection.execute(
            insert(tables.tree_entry),
            [
                {
                    "commit_oid": oid,
                    "path": entry.path,
                    "sha256": entry.sha256,
                    "git_sha1": entry.git_sha1,
                    "size_bytes": entry.size_bytes,
                    "is_lfs": entry.is_lfs,
                }
                for entry in entries
            ],
        )
    return commit


async def _insert_record(connection: AsyncConnection, commit: Commit, found: ValidationRecord, now: float) -> None:
    await connection.execute(
        insert(tables.validation).values(
            commit_oid=commit.oid,
            validator_version=found.validator_version,
            checked_at=now,
            record=msgspec.json.encode(found).decode(),
        )
    )


async def _move_refs(
    connection: AsyncConnection, repo: Repo, ref: Ref, commit: Commit, *, actor: Actor, now: float
) -> None:
    table = tables.ref
    await end_canary(connection, repo, ref.name)
    await connection.execute(
        update(table)
        .where(table.c.repo == repo.key, table.c.name == ref.name)
        .values(commit_oid=commit.oid, updated_at=now)
    )
    await connection.execute(
        insert(tables.ref_log).values(
            repo=repo.key,
            name=ref.name,
            kind="push",
            old_oid=ref.commit_oid,
            new_oid=commit.oid,
            by=actor.name,
            at=now,
            reason=commit.title[:2000],
        )
    )
    values: dict[str, object] = {"updated_at": now}
    if commit.version is not None:
        await connection.execute(
            insert(table).values(
                repo=repo.key,
                name=commit.version,
                kind="version",
                commit_oid=commit.oid,
                protected=True,
                message="",
                updated_at=now,
            )
        )
        values["next_version"] = repo.next_version + 1
    await connection.execute(update(tables.repo).where(tables.repo.c.id == repo.key).values(**values))


def _parent_moved(channel: str, head: Commit | None) -> ParentMoved:
    at = "elsewhere" if head is None else f"at {head.oid}"
    return ParentMoved(f"{channel} is {at} by now, not where this commit starts", hint="fetch it and commit again")


def _rejected(found: ValidationRecord) -> AdapterInvalid:
    lines = [f"{finding.code}: {finding.message}" for finding in found.rejections]
    hints = [finding.hint for finding in found.rejections if finding.hint]
    return AdapterInvalid("; ".join(lines), hint=hints[0] if hints else "`loractl check DIR` runs the same checks")
