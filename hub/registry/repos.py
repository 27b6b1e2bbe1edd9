"""Repos: made, found under present and old names, hidden from those who may not see them. Knows no files."""

import time
from dataclasses import dataclass

from sqlalchemy import delete, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from loractl.adapters.errors import BadRequest, Conflict, NotAllowed, RepoNotFound
from loractl.adapters.reference import DEFAULT_REVISION, check_name_part
from loractl.hub import tables
from loractl.hub.actor import Actor, Right
from loractl.hub.database import Database
from loractl.hub.failpoints import reach
from loractl.hub.registry.journal import emit, record
from loractl.hub.registry.quotas import Quotas
from loractl.hub.registry.records import EMPTY_COMMIT_TITLE, Repo, repo_of
from loractl.hub.registry.tree import commit_oid, tree_sha256

# First parts of paths that the hub itself answers.
RESERVED_NAMESPACES = frozenset(
    {"api", "healthz", "readyz", "metrics", "schema", "static", "xet", "lfs", "assets", "login", "logout", "datasets"}
    | {"spaces", "models", "oauth", "adapters", "v1", "events"}
)


class RepoMoved(Exception):
    """The name is an old one; the HTTP layer answers with the new address."""

    def __init__(self, repo_id: str) -> None:
        super().__init__(repo_id)
        self.repo_id = repo_id


@dataclass(frozen=True, slots=True)
class CreatedRepo:
    """A repo, and whether it is new."""

    repo: Repo
    is_new: bool


def repo_not_found(repo_id: str) -> RepoNotFound:
    """The one answer for a repo that is absent and for one that is private to others."""
    return RepoNotFound(f"no repo {repo_id}", hint="it does not exist, or it is private and this token may not see it")


def check_repo_id(namespace: str, name: str) -> None:
    """Raise UsageError or BadRequest unless this may name a repo."""
    for part in (namespace, name):
        check_name_part(part, whole=f"{namespace}/{name}")
    if namespace.casefold() in RESERVED_NAMESPACES:
        raise BadRequest(f"{namespace!r} is reserved by the hub", hint="choose another team name", field="organization")


async def lock_repo(connection: AsyncConnection, key: int) -> Repo:
    """Read the repo and keep every other writer of it waiting until this transaction ends; raises RepoNotFound."""
    row = (await connection.execute(select(tables.repo).where(tables.repo.c.id == key).with_for_update())).first()
    if row is None:
        raise RepoNotFound("the repo was deleted meanwhile")
    return repo_of(row)


class Repos:
    """All that concerns a repo as a whole."""

    def __init__(self, database: Database, quotas: Quotas) -> None:
        self._database = database
        self._quotas = quotas

    async def find(self, repo_id: str, *, actor: Actor, right: Right = "read") -> Repo:
        """Find a repo that the actor may see. Raises RepoNotFound, RepoMoved, or NotAllowed when only `right` lacks."""
        async with self._database.read() as connection:
            return await self.find_in(connection, repo_id, actor=actor, right=right)

    async def by_key(self, key: int) -> Repo:
        """A repo by the database's number, for addresses that the hub signed; raises RepoNotFound."""
        async with self._database.read() as connection:
            row = (await connection.execute(select(tables.repo).where(tables.repo.c.id == key))).first()
        if row is None:
            raise RepoNotFound("the repo was deleted meanwhile")
        return repo_of(row)

    async def find_in(self, connection: AsyncConnection, repo_id: str, *, actor: Actor, right: Right = "read") -> Repo:
        namespace, _, name = repo_id.partition("/")
        table = tables.repo
        row = (
            await connection.execute(select(table).where(table.c.namespace == namespace, table.c.name == name))
        ).first()
        if row is None:
            await self._raise_if_moved(connection, repo_id, actor=actor)
            raise repo_not_found(repo_id)
        repo = repo_of(row)
        if not actor.may("read", repo.repo_id, private=repo.private):
            # The same work as for a repo that is not there, so that time tells nothing either.
            await self._raise_if_moved(connection, repo_id, actor=actor)
            raise repo_not_found(repo_id)
        actor.require(right, repo.repo_id, private=repo.private)
        return repo

    async def _raise_if_moved(self, connection: AsyncConnection, repo_id: str, *, actor: Actor) -> None:
        joined = tables.repo_alias.join(tables.repo, tables.repo_alias.c.repo == tables.repo.c.id)
        query = select(tables.repo).select_from(joined).where(tables.repo_alias.c.folded == repo_id.casefold())
        row = (await connection.execute(query)).first()
        if row is not None and actor.may("read", repo_of(row).repo_id, private=row.private):
            raise RepoMoved(repo_of(row).repo_id)

    async def create(self, namespace: str, name: str, *, private: bool, actor: Actor) -> CreatedRepo:
        """Make a repo with an empty `main`; an existing one that the actor may see is returned as it is."""
        check_repo_id(namespace, name)
        repo_id = f"{namespace}/{name}"
        if not actor.covers(repo_id) or not actor.roles & {"write", "admin"}:
            raise NotAllowed(
                f"this token may not create {repo_id}", hint="it needs the role write and a pattern for it"
            )
        async with self._database.write() as connection:
            existing = await self._existing(connection, repo_id)
            if existing is not None:
                if existing.repo_id != repo_id:
                    may_know = actor.may("read", existing.repo_id, private=existing.private)
                    whose = existing.repo_id if may_know else "another repo"
                    raise Conflict(f"{repo_id} is, or was, the name of {whose}", hint="choose another name")
                return CreatedRepo(existing, is_new=False)
            now = time.time()
            await self._ensure_namespace(connection, namespace, now)
            await self._quotas.check_repos(connection, namespace)
            row = await connection.execute(
                insert(tables.repo)
                .values(
                    namespace=namespace,
                    name=name,
                    folded=repo_id.casefold(),
                    private=private,
                    created_at=now,
                    updated_at=now,
                    num_downloads=0,
                    next_version=1,
                )
                .returning(tables.repo)
            )
            repo = repo_of(row.one())
            await self._make_main(connection, repo, actor=actor, now=now)
            await record(connection, actor, "repo.create", target=repo_id, detail={"private": private})
            await emit(connection, "repo.created", repo, {})
            reach("repo-before-end")
        return CreatedRepo(repo, is_new=True)

    async def _existing(self, connection: AsyncConnection, repo_id: str) -> Repo | None:
        table, alias = tables.repo, tables.repo_alias
        row = (await connection.execute(select(table).where(table.c.folded == repo_id.casefold()))).first()
        if row is None:
            query = select(table).select_from(alias.join(table, alias.c.repo == table.c.id))
            row = (await connection.execute(query.where(alias.c.folded == repo_id.casefold()))).first()
        return None if row is None else repo_of(row)

    async def _ensure_namespace(self, connection: AsyncConnection, name: str, now: float) -> None:
        dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
        await connection.execute(
            dialect.insert(tables.namespace).values(name=name, created_at=now).on_conflict_do_nothing()
        )

    async def _make_main(self, connection: AsyncConnection, repo: Repo, *, actor: Actor, now: float) -> None:
        empty = tree_sha256([])
        oid = commit_oid(
            repo=repo.key,
            parent=None,
            tree=empty,
            title=EMPTY_COMMIT_TITLE,
            message="",
            author=actor.name,
            created_at=now,
        )
        await connection.execute(
            insert(tables.commit).values(
                oid=oid,
                repo=repo.key,
                title=EMPTY_COMMIT_TITLE,
                message="",
                author=actor.name,
                created_at=now,
                tree_sha256=empty,
                num_files=0,
                size_bytes=0,
                adapter_size_bytes=0,
                metrics="{}",
                tags="[]",
            )
        )
        await connection.execute(
            insert(tables.ref).values(
                repo=repo.key, name=DEFAULT_REVISION, kind="branch", commit_oid=oid, protected=False, updated_at=now
            )
        )
        await connection.execute(
            insert(tables.ref_log).values(
                repo=repo.key, name=DEFAULT_REVISION, kind="create", new_oid=oid, by=actor.name, at=now, reason=""
            )
        )

    async def delete(self, repo: Repo, *, actor: Actor) -> None:
        """Remove a repo, its history and its old names; its blobs go with the next gc."""
        async with self._database.write() as connection:
            await lock_repo(connection, repo.key)
            await emit(connection, "repo.deleted", repo, {})
            await record(connection, actor, "repo.delete", target=repo.repo_id)
            # The order of the foreign keys: refs hold commits, commits hold trees.
            await connection.execute(delete(tables.ref).where(tables.ref.c.repo == repo.key))
            await connection.execute(delete(tables.repo).where(tables.repo.c.id == repo.key))

    async def move(self, repo: Repo, to_namespace: str, to_name: str, *, actor: Actor) -> Repo:
        """Give a repo another name; the old one keeps leading to it. Raises Conflict when the new one is taken."""
        check_repo_id(to_namespace, to_name)
        new_id = f"{to_namespace}/{to_name}"
        actor.require("admin", new_id, private=True)
        async with self._database.write() as connection:
            await lock_repo(connection, repo.key)
            other = await self._existing(connection, new_id)
            if other is not None and other.key != repo.key:
                raise Conflict(f"{new_id} is, or was, the name of another repo", hint="choose another name")
            await self._ensure_namespace(connection, to_namespace, time.time())
            if to_namespace != repo.namespace:
                await self._quotas.check_repos(connection, to_namespace)
            alias = tables.repo_alias
            await connection.execute(delete(alias).where(alias.c.folded == new_id.casefold()))
            row = await connection.execute(
                update(tables.repo)
                .where(tables.repo.c.id == repo.key)
                .values(namespace=to_namespace, name=to_name, folded=new_id.casefold(), updated_at=time.time())
                .returning(tables.repo)
            )
            moved = repo_of(row.one())
            if new_id.casefold() != repo.repo_id.casefold():
                await connection.execute(insert(alias).values(folded=repo.repo_id.casefold(), repo=repo.key))
            await record(connection, actor, "repo.move", target=repo.repo_id, detail={"to": new_id})
            await emit(connection, "repo.moved", moved, {"from": repo.repo_id})
        return moved

    async def set_private(self, repo: Repo, *, private: bool, actor: Actor) -> None:
        """Hide a repo or show it."""
        async with self._database.write() as connection:
            await connection.execute(update(tables.repo).where(tables.repo.c.id == repo.key).values(private=private))
            await record(connection, actor, "repo.visibility", target=repo.repo_id, detail={"private": private})
            await emit(connection, "repo.visibility", repo, {"private": private})

    async def count_download(self, repo: Repo) -> None:
        """Note one download of an adapter's weights."""
        async with self._database.write() as connection:
            table = tables.repo
            await connection.execute(
                update(table).where(table.c.id == repo.key).values(num_downloads=table.c.num_downloads + 1)
            )
