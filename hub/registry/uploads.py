"""Uploads in parts: sessions that own staged bytes until they become a blob or expire. Knows no address of a route."""

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

from sqlalchemy import delete, insert, select

from loractl.adapters.errors import BadData, BadRequest, BlobMissing, NotFound
from loractl.hub import tables
from loractl.hub.actor import Actor
from loractl.hub.blobs.store import BLOCK_BYTES, BlobStore, StoredBlob
from loractl.hub.database import Database
from loractl.hub.registry.ledger import Ledger
from loractl.hub.registry.records import Repo, repo_of
from loractl.hub.settings import HubSettings

_SESSION = re.compile(r"[0-9a-f]{32}")


class Uploads:
    """Sessions of multipart and Xet uploads; each belongs to one repo and dies with it, or when it expires."""

    def __init__(self, database: Database, store: BlobStore, ledger: Ledger, settings: HubSettings) -> None:
        self._database = database
        self._store = store
        self._ledger = ledger
        self._settings = settings

    async def open_session(self, repo: Repo, kind: str, *, actor: Actor) -> str:
        """Begin an upload; its id is random, so that no client remembers anything of an earlier one."""
        session = secrets.token_hex(16)
        async with self._database.write() as connection:
            await connection.execute(
                insert(tables.upload_session).values(
                    id=session,
                    kind=kind,
                    repo=repo.key,
                    owner=actor.name,
                    expires_at=time.time() + self._settings.upload_ttl_s,
                )
            )
        return session

    async def session_repo(self, session: str, kind: str) -> Repo:
        """The repo that an open session uploads to; raises NotFound for one that is unknown or expired."""
        table = tables.upload_session
        if _SESSION.fullmatch(session):
            async with self._database.read() as connection:
                query = (
                    select(tables.repo)
                    .select_from(table.join(tables.repo, table.c.repo == tables.repo.c.id))
                    .where(table.c.id == session, table.c.kind == kind, table.c.expires_at > time.time())
                )
                row = (await connection.execute(query)).first()
            if row is not None:
                return repo_of(row)
        raise NotFound("the upload session is unknown or has expired", hint="start the upload again")

    async def close_session(self, session: str) -> None:
        """End an upload and drop its parts."""
        async with self._database.write() as connection:
            await connection.execute(delete(tables.upload_session).where(tables.upload_session.c.id == session))
        await self._store.drop_stage(session)

    async def close_expired(self) -> int:
        """End all uploads whose time is over; returns how many."""
        table = tables.upload_session
        async with self._database.read() as connection:
            query = select(table.c.id).where(table.c.expires_at <= time.time())
            expired = list((await connection.execute(query)).scalars())
        for session in expired:
            await self.close_session(session)
        return len(expired)

    async def stage_part(self, session: str, part: str, chunks: AsyncIterable[bytes], *, max_bytes: int) -> int:
        """Keep one part; returns its size in bytes."""
        return await self._store.stage(session, part, chunks, max_bytes=max_bytes)

    async def join_parts(self, repo: Repo, session: str, num_parts: int, *, sha256: str, size_bytes: int) -> StoredBlob:
        """Make a blob of parts 1..n in order; raises BadRequest for a missing part, BadData for another whole."""
        async with AsyncExitStack() as stack:
            paths: list[Path] = []
            for number in range(1, num_parts + 1):
                try:
                    paths.append(await stack.enter_async_context(self._store.staged_copy(session, f"{number:05d}")))
                except BlobMissing as error:
                    raise BadRequest(
                        f"part {number} of {num_parts} is missing", hint="send it, then complete"
                    ) from error
            if sum(path.stat().st_size for path in paths) != size_bytes:
                raise BadData(f"the parts together are not the {size_bytes} bytes that were announced")
            stored = await self._ledger.keep(repo, _joined(paths), sha256=sha256, size_bytes=size_bytes)
        await self.close_session(session)
        return stored


async def _joined(paths: list[Path]) -> AsyncIterator[bytes]:
    for path in paths:
        with await asyncio.to_thread(path.open, "rb") as stream:
            while piece := await asyncio.to_thread(stream.read, BLOCK_BYTES):
                yield piece
