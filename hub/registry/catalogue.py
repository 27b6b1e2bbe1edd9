"""Lists, searches and the full view of a repo. Reads only."""

import base64
from dataclasses import dataclass, field
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, and_, exists, func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from loractl.adapters.digest import CARD_FILE, CONFIG_FILE, MANIFEST_FILE
from loractl.adapters.errors import BadRequest
from loractl.adapters.reference import DEFAULT_REVISION
from loractl.hub import tables
from loractl.hub.actor import Actor
from loractl.hub.blobs.store import BlobStore
from loractl.hub.checks import read_json
from loractl.hub.database import Database
from loractl.hub.moments import iso
from loractl.hub.registry.canaries import canary_view, running_canaries
from loractl.hub.registry.records import Commit, Repo, TreeEntry, commit_of, ref_of, repo_of
from loractl.hub.registry.revisions import read_tree, resolve
from loractl.hub.wire import (
    AdapterDetail,
    AdapterSummary,
    ChannelView,
    FileView,
    Finding,
    Resolved,
    ValidationRecord,
    VersionView,
)

_MAX_TEXT_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What a list is narrowed to; every part that is given must hold."""

    base: str | None = None
    """A base's id or fingerprint."""
    text: str | None = None
    task: str | None = None
    rank: int | None = None
    namespace: str | None = None
    author: str | None = None
    """The name of the token that pushed what `main` holds."""
    tags: tuple[str, ...] = ()
    sort: str = "updated_at"
    limit: int = 100
    cursor: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """One line of a list."""

    repo: Repo
    head: Commit


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a list; `next_cursor` is None at its end."""

    found: list[Found] = field(default_factory=list)
    next_cursor: str | None = None


class Catalogue:
    """What is in the hub, for people and for servers."""

    def __init__(self, database: Database, store: BlobStore) -> None:
        self._database = database
        self._store = store

    async def search(self, wanted: Search, *, actor: Actor) -> Page:
        """One page of the repos that the actor may see, stable while others push; BadRequest for a bad cursor."""
        found: list[Found] = []
        cursor = wanted.cursor
        async with self._database.read() as connection:
            while len(found) < wanted.limit:
                rows = await _page(connection, wanted, cursor, wanted.limit - len(found), actor=actor)
                # The pattern of a token is matched here, not in SQL, so that there is one matcher.
                found += [one for one in rows if actor.may("read", one.repo.repo_id, private=one.repo.private)]
                if not rows:
                    return Page(found, None)
                cursor = _cursor(wanted.sort, rows[-1].repo)
                if len(rows) < wanted.limit and len(found) < wanted.limit:
                    return Page(found, None)
        return Page(found, cursor)

    async def summaries(self, page: Page) -> list[AdapterSummary]:
        """The lines of a page with their channels and newest versions."""
        keys = [one.repo.key for one in page.found]
        ref, commit = tables.ref, tables.commit
        async with self._database.read() as connection:
            query = (
                select(ref.c.repo, ref.c.name, commit.c.oid, commit.c.version)
                .select_from(ref.join(commit, ref.c.commit_oid == commit.c.oid))
                .where(ref.c.repo.in_(keys), ref.c.kind == "branch")
            )
            channels: dict[int, dict[str, str]] = {}
            for row in await connection.execute(query):
                channels.setdefault(row.repo, {})[row.name] = row.version or row.oid
        return [_summary(one, channels.get(one.repo.key, {})) for one in page.found]

    async def resolved(self, repo: Repo, revision: str) -> Resolved:
        """Make a revision exact; raises RevisionNotFound."""
        async with self._database.read() as connection:
            return await self._resolved(connection, repo, revision, await resolve(connection, repo, revision))

    async def _resolved(self, connection: AsyncConnection, repo: Repo, revision: str, commit: Commit) -> Resolved:
        yank = tables.yank
        reason = await connection.execute(select(yank.c.reason).where(yank.c.commit_oid == commit.oid))
        canaries = await running_canaries(connection, repo)
        return Resolved(
            repo_id=repo.repo_id,
            revision=revision,
            commit=commit.oid,
            digest=commit.digest,
            version=commit.version,
            base_id=commit.base_id,
            base_fingerprint=commit.base_fingerprint,
            rank=commit.rank,
            size_bytes=commit.size_bytes,
            adapter_size_bytes=commit.adapter_size_bytes,
            yanked=reason.scalar_one_or_none(),
            canary=canary_view(canaries.get(revision.removeprefix("refs/heads/"))),
        )

    async def detail(self, repo: Repo, revision: str) -> AdapterDetail:
        """All that is known of a repo, seen at a revision; raises RevisionNotFound."""
        async with self._database.read() as connection:
            commit = await resolve(connection, repo, revision)
            resolved = await self._resolved(connection, repo, revision, commit)
            tree = await read_tree(connection, commit.oid)
            versions = await _versions(connection, repo)
            channels = await _channels(connection, repo)
            validation = await _validation(connection, commit.oid)
        manifest = read_json(await self._text(tree, MANIFEST_FILE))
        parent = (manifest or {}).get("parent")
        return AdapterDetail(
            repo_id=repo.repo_id,
            private=repo.private,
            created_at=iso(repo.created_at),
            resolved=resolved,
            versions=versions,
            channels=channels,
            files=[FileView(path=entry.path, size_bytes=entry.size_bytes, sha256=entry.sha256) for entry in tree],
            validation=validation,
            config=read_json(await self._text(tree, CONFIG_FILE)),
            manifest=manifest,
            card=(await self._text(tree, CARD_FILE)).decode("utf-8", "replace") or None,
            num_downloads=repo.num_downloads,
            parent=next((one.version for one in versions if parent is not None and one.digest == parent), None),
        )

    async def validation(self, repo: Repo, revision: str) -> ValidationRecord | None:
        """The verdict on a revision as it was given at push; None for a commit without files."""
        async with self._database.read() as connection:
            return await _validation(connection, (await resolve(connection, repo, revision)).oid)

    async def totals(self) -> tuple[int, int]:
        """Number of repos and of commits."""
        async with self._database.read() as connection:
            num_repos = (await connection.execute(select(func.count()).select_from(tables.repo))).scalar_one()
            num_commits = (await connection.execute(select(func.count()).select_from(tables.commit))).scalar_one()
        return int(num_repos), int(num_commits)

    async def _text(self, tree: list[TreeEntry], path: str) -> bytes:
        entry = next((entry for entry in tree if entry.path == path), None)
        if entry is None or entry.size_bytes > _MAX_TEXT_BYTES:
            return b""
        return b"".join([piece async for piece in self._store.read(entry.sha256)])


async def _page(
    connection: AsyncConnection, wanted: Search, cursor: str | None, limit: int, *, actor: Actor
) -> list[Found]:
    repo, commit, ref = tables.repo, tables.commit, tables.ref
    column = repo.c[wanted.sort]
    on_repo, on_head = _conditions(wanted, actor)
    if cursor is not None:
        value, key = _read_cursor(cursor)
        on_repo.append(or_(column < value, and_(column == value, repo.c.id < key)))
    # Asked per repo, so that the walk along the sorted index ends with the page; a join would be sorted as a whole.
    head_fits = (
        select(ref.c.repo)
        .select_from(ref.join(commit, commit.c.oid == ref.c.commit_oid))
        .where(ref.c.repo == repo.c.id, ref.c.name == DEFAULT_REVISION, *on_head)
        .correlate(repo)
    )
    query = select(repo).where(*on_repo, exists(head_fits)).order_by(column.desc(), repo.c.id.desc()).limit(limit)
    part = query.subquery("part")
    joined = part.join(ref, and_(ref.c.repo == part.c.id, ref.c.name == DEFAULT_REVISION)).join(
        commit, commit.c.oid == ref.c.commit_oid
    )
    columns = [*part.c, *(item.label(f"c_{item.name}") for item in commit.c)]
    whole = select(*columns).select_from(joined).order_by(part.c[wanted.sort].desc(), part.c.id.desc())
    rows = (await connection.execute(whole)).all()
    found: list[Found] = []
    for row in rows:
        head = _Prefixed(row._mapping)
        found.append(Found(repo_of(row), commit_of(head)))  # type: ignore[arg-type]
    return found


class _Prefixed:
    """The commit's columns of a joined row, by their own names."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Any:
        return self._values[f"c_{name}"]


def _conditions(wanted: Search, actor: Actor) -> tuple[list[ColumnElement[bool]], list[ColumnElement[bool]]]:
    """What must hold of the repo, and what of the commit that its `main` points to."""
    repo, commit = tables.repo, tables.commit
    on_repo: list[ColumnElement[bool]] = []
    on_head: list[ColumnElement[bool]] = []
    if not actor.pattern:
        on_repo.append(repo.c.private.is_(False))
    if wanted.namespace is not None:
        on_repo.append(repo.c.namespace == wanted.namespace)
    if wanted.base is not None:
        on_head.append(or_(commit.c.base_id == wanted.base, commit.c.base_fingerprint == wanted.base))
    if wanted.task is not None:
        on_head.append(func.lower(commit.c.task) == wanted.task.lower())
    if wanted.rank is not None:
        on_head.append(commit.c.rank == wanted.rank)
    if wanted.author is not None:
        on_head.append(commit.c.author == wanted.author)
    if wanted.text:
        folded = wanted.text.casefold()
        on_head.append(
            or_(
                repo.c.folded.contains(folded, autoescape=True),
                func.lower(commit.c.base_id).contains(folded, autoescape=True),
                func.lower(commit.c.tags).contains(folded, autoescape=True),
                func.lower(commit.c.task).contains(folded, autoescape=True),
            )
        )
    # A tag is found as the quoted element of the JSON list.
    on_head += [commit.c.tags.contains(msgspec.json.encode(tag).decode(), autoescape=True) for tag in wanted.tags]
    return on_repo, on_head


def _cursor(sort: str, repo: Repo) -> str:
    value = getattr(repo, sort)
    return base64.urlsafe_b64encode(msgspec.json.encode([value, repo.key])).decode().rstrip("=")


def _read_cursor(cursor: str) -> tuple[float, int]:
    try:
        return msgspec.json.decode(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)), type=tuple[float, int])
    except (ValueError, msgspec.DecodeError) as error:
        raise BadRequest("not a cursor of this list", field="cursor") from error


def _summary(one: Found, channels: dict[str, str]) -> AdapterSummary:
    newest = one.repo.next_version - 1
    return AdapterSummary(
        repo_id=one.repo.repo_id,
        private=one.repo.private,
        commit=one.head.oid,
        digest=one.head.digest,
        version=f"v{newest}" if newest else None,
        base_id=one.head.base_id,
        base_fingerprint=one.head.base_fingerprint,
        task=one.head.task,
        rank=one.head.rank,
        size_bytes=one.head.size_bytes,
        updated_at=iso(one.repo.updated_at),
        num_downloads=one.repo.num_downloads,
        channels=channels,
    )


async def _versions(connection: AsyncConnection, repo: Repo) -> list[VersionView]:
    commit, yank = tables.commit, tables.yank
    query = (
        select(commit, yank.c.reason)
        .select_from(commit.outerjoin(yank, yank.c.commit_oid == commit.c.oid))
        .where(commit.c.repo == repo.key, commit.c.version.is_not(None))
        .order_by(commit.c.created_at.desc())
    )
    views: list[VersionView] = []
    for row in (await connection.execute(query)).all():
        found = commit_of(row)
        views.append(
            VersionView(
                version=found.version or "",
                commit=found.oid,
                digest=found.digest,
                created_at=iso(found.created_at),
                author=found.author,
                message=found.title,
                size_bytes=found.size_bytes,
                metrics=found.metrics,
                yanked=row.reason,
            )
        )
    return views


async def _channels(connection: AsyncConnection, repo: Repo) -> list[ChannelView]:
    ref, commit = tables.ref, tables.commit
    query = (
        select(ref, commit.c.version)
        .select_from(ref.join(commit, ref.c.commit_oid == commit.c.oid))
        .where(ref.c.repo == repo.key, ref.c.kind == "branch")
        .order_by(ref.c.name)
    )
    canaries = await running_canaries(connection, repo)
    views: list[ChannelView] = []
    for row in (await connection.execute(query)).all():
        found = ref_of(row)
        views.append(
            ChannelView(
                channel=found.name,
                commit=found.commit_oid,
                version=row.version,
                protected=found.protected,
                updated_at=iso(found.updated_at),
                canary=canary_view(canaries.get(found.name)),
            )
        )
    return views


async def _validation(connection: AsyncConnection, commit_oid: str) -> ValidationRecord | None:
    table = tables.validation
    row = (await connection.execute(select(table).where(table.c.commit_oid == commit_oid))).first()
    if row is None:
        return None
    stored = msgspec.json.decode(row.record, type=_StoredRecord)
    return ValidationRecord(
        commit=commit_oid,
        validator_version=row.validator_version,
        checked_at=iso(row.checked_at),
        findings=stored.findings,
        digests=stored.digests,
    )


class _StoredRecord(msgspec.Struct):
    findings: list[Finding] = []
    digests: dict[str, str] = {}
