"""What a namespace may use: bytes and repos, asked for again in the very transaction that would exceed it."""

import time
from collections.abc import Iterable

from msgspec import UNSET
from sqlalchemy import Select, func, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from loractl.adapters.errors import WillNotFit
from loractl.adapters.reference import check_name_part
from loractl.hub import tables
from loractl.hub.actor import Actor
from loractl.hub.admin_wire import QuotaSet, QuotaView
from loractl.hub.database import Database
from loractl.hub.registry.journal import record
from loractl.hub.registry.records import Repo, TreeEntry
from loractl.hub.settings import HubSettings


class Quotas:
    """Sets limits and holds pushes to them."""

    def __init__(self, database: Database, settings: HubSettings) -> None:
        self._database = database
        self._settings = settings

    async def list_all(self) -> list[QuotaView]:
        """Every namespace with its limits and use, by name."""
        table = tables.namespace
        async with self._database.read() as connection:
            names = (await connection.execute(select(table.c.name).order_by(table.c.name))).scalars().all()
            return [await self._view(connection, name) for name in names]

    async def set(self, namespace: str, wanted: QuotaSet, *, actor: Actor) -> QuotaView:
        """Limit a namespace, which need not have a repo yet. Raises UsageError for a name that none can have."""
        check_name_part(namespace, whole=namespace)
        table = tables.namespace
        asked = {"quota_bytes": wanted.size_bytes, "quota_repos": wanted.num_repos}
        values = {name: value for name, value in asked.items() if value is not UNSET}
        async with self._database.write() as connection:
            dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
            made = dialect.insert(table).values(name=namespace, created_at=time.time()).on_conflict_do_nothing()
            await connection.execute(made)
            if values:
                await connection.execute(update(table).where(table.c.name == namespace).values(**values))
            await record(connection, actor, "quota.set", target=namespace, detail=values)
            return await self._view(connection, namespace)

    async def check_bytes(self, connection: AsyncConnection, repo: Repo, files: Iterable[TreeEntry]) -> None:
        """Raise WillNotFit when a commit of these files would exceed the namespace's bytes; others of it wait."""
        limit = await self._limit(connection, repo.namespace, lock=True)
        if not limit:
            return
        sizes = {entry.sha256: entry.size_bytes for entry in files}
        named = {row.sha256 for row in await connection.execute(_named(repo.namespace, set(sizes)))}
        new_bytes = sum(size for sha256, size in sizes.items() if sha256 not in named)
        used_bytes = await used_in(connection, repo.namespace)
        if new_bytes and used_bytes + new_bytes > limit:
            raise over_bytes(repo.namespace, used_bytes=used_bytes, new_bytes=new_bytes, quota_bytes=limit)

    async def check_repos(self, connection: AsyncConnection, namespace: str) -> None:
        """Raise WillNotFit when the namespace may hold no further repo."""
        table = tables.namespace
        query = select(table.c.quota_repos).where(table.c.name == namespace).with_for_update()
        own = (await connection.execute(query)).scalar_one_or_none()
        limit = self._settings.namespace_quota_repos if own is None else own
        num_repos = await _num_repos(connection, namespace)
        if limit and num_repos >= limit:
            raise WillNotFit(
                f"{namespace} has {num_repos} of its {limit} repos",
                hint=f"delete one, or have the operator run `loractl hub quota set {namespace} --repos {limit + 1}`",
            )

    async def _limit(self, connection: AsyncConnection, namespace: str, *, lock: bool = False) -> int:
        table = tables.namespace
        query = select(table.c.quota_bytes).where(table.c.name == namespace)
        own = (await connection.execute(query.with_for_update() if lock else query)).scalar_one_or_none()
        return self._settings.namespace_quota_bytes if own is None else int(own)

    async def _view(self, connection: AsyncConnection, namespace: str) -> QuotaView:
        table = tables.namespace
        row = (await connection.execute(select(table).where(table.c.name == namespace))).one()
        repos = self._settings.namespace_quota_repos if row.quota_repos is None else row.quota_repos
        return QuotaView(
            namespace=namespace,
            quota_bytes=await self._limit(connection, namespace),
            used_bytes=await used_in(connection, namespace),
            quota_repos=repos,
            num_repos=await _num_repos(connection, namespace),
            is_default=row.quota_bytes is None and row.quota_repos is None,
        )


def over_bytes(namespace: str, *, used_bytes: int, new_bytes: int, quota_bytes: int) -> WillNotFit:
    """The refusal, with the figures and what helps."""
    return WillNotFit(
        f"{namespace} uses {used_bytes:,} of its {quota_bytes:,} bytes; this push needs {new_bytes:,} more",
        hint="delete what is not needed, or have the operator run "
        f"`loractl hub quota set {namespace} --bytes {used_bytes + new_bytes}`",
    )


async def used_in(connection: AsyncConnection, namespace: str) -> int:
    """What a namespace keeps: each blob that its repos name counts once."""
    entries, commits, repos = tables.tree_entry, tables.commit, tables.repo
    joined = entries.join(commits, entries.c.commit_oid == commits.c.oid).join(repos, commits.c.repo == repos.c.id)
    distinct = (
        select(entries.c.sha256, entries.c.size_bytes)
        .select_from(joined)
        .where(repos.c.namespace == namespace)
        .distinct()
        .subquery()
    )
    return int((await connection.execute(select(func.coalesce(func.sum(distinct.c.size_bytes), 0)))).scalar_one())


def _named(namespace: str, digests: set[str]) -> "Select[tuple[str]]":
    entries, commits, repos = tables.tree_entry, tables.commit, tables.repo
    joined = entries.join(commits, entries.c.commit_oid == commits.c.oid).join(repos, commits.c.repo == repos.c.id)
    return (
        select(entries.c.sha256)
        .select_from(joined)
        .where(repos.c.namespace == namespace, entries.c.sha256.in_(digests))
        .distinct()
    )


async def _num_repos(connection: AsyncConnection, namespace: str) -> int:
    table = tables.repo
    query = select(func.count()).select_from(table).where(table.c.namespace == namespace)
    return int((await connection.execute(query)).scalar_one())
