"""The books of blobs: which exist, which repo may use which, who touched them last. Knows no file of a commit.

A blob's row is locked while its bytes are put in place and while gc takes them away, so the two never cross:

    upload   [lock row: state=ready, touched=now; publish bytes]         one transaction
    gc       [state=deleting where nothing names it and touched < cutoff],
             then [lock row: still deleting? unlink; drop row]
"""

import time
from collections.abc import AsyncIterable, Iterable

from sqlalchemy import func, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from loractl.adapters.errors import WillNotFit
from loractl.hub import tables
from loractl.hub.blobs.store import BlobStore, ReceivedBlob, StoredBlob
from loractl.hub.database import Database
from loractl.hub.failpoints import reach
from loractl.hub.metrics import HubMetrics
from loractl.hub.registry.quotas import over_bytes
from loractl.hub.registry.records import Repo
from loractl.hub.settings import HubSettings

READY = "ready"
DELETING = "deleting"
_MAX_VARIABLES = 500


class Ledger:
    """Takes bytes in, and says which are there."""

    def __init__(self, database: Database, store: BlobStore, settings: HubSettings, metrics: HubMetrics) -> None:
        self._database = database
        self._store = store
        self._settings = settings
        self._metrics = metrics

    async def keep(
        self, repo: Repo, chunks: AsyncIterable[bytes], *, sha256: str | None = None, size_bytes: int | None = None
    ) -> StoredBlob:
        """Take a blob in for a repo; durable when this returns. Raises BadData, WillNotFit, Unreachable."""
        async with self._store.receive(chunks, sha256=sha256, size_bytes=size_bytes) as received:
            return await self.admit(repo, received)

    async def admit(self, repo: Repo, received: ReceivedBlob) -> StoredBlob:
        """Make what was received a blob that this repo may use."""
        blob = received.blob
        async with self._database.write() as connection:
            dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
            kept = select(tables.blob.c.sha256).where(tables.blob.c.sha256 == blob.sha256, tables.blob.c.state == READY)
            is_known = (await connection.execute(kept)).first() is not None
            values = {"state": READY, "touched_at": time.time(), "block_crc32": blob.block_crc32}
            await connection.execute(
                dialect.insert(tables.blob)
                .values(sha256=blob.sha256, size_bytes=blob.size_bytes, **values)
                .on_conflict_do_update(index_elements=["sha256"], set_=values)
            )
            await connection.execute(
                dialect.insert(tables.repo_blob).values(repo=repo.key, sha256=blob.sha256).on_conflict_do_nothing()
            )
            reach("blob-before-publish")
            await self._store.publish(received)
            reach("blob-before-row")
        if is_known:
            self._metrics.blob_dedup_bytes.inc(blob.size_bytes)
        return blob

    async def known(self, repo: Repo, digests: Iterable[str]) -> dict[str, int]:
        """Those of `digests` that this repo may use, with their sizes; they are touched, so gc leaves them be."""
        async with self._database.write() as connection:
            return await known_in(connection, repo, digests)

    async def check_room(self, repo: Repo, *, new_bytes: int, used_bytes: int) -> None:
        """Raise WillNotFit when a push of this size would break the namespace's quota or fill the disk."""
        free = await self._store.free_bytes()
        if free is not None and free - new_bytes < self._settings.free_bytes_reserve:
            raise WillNotFit(
                f"the hub has {free:,} bytes left, {self._settings.free_bytes_reserve:,} of them in reserve; "
                f"this push needs {new_bytes:,}",
                hint="free space on the hub's disk, or run `loractl hub gc`",
            )
        quota = await self.quota_bytes(repo.namespace)
        if quota and used_bytes + new_bytes > quota:
            raise over_bytes(repo.namespace, used_bytes=used_bytes, new_bytes=new_bytes, quota_bytes=quota)

    async def quota_bytes(self, namespace: str) -> int:
        """The quota of a namespace in bytes; 0 where there is none."""
        table = tables.namespace
        async with self._database.read() as connection:
            own = (
                await connection.execute(select(table.c.quota_bytes).where(table.c.name == namespace))
            ).scalar_one_or_none()
        return self._settings.namespace_quota_bytes if own is None else int(own)

    async def totals(self) -> tuple[int, int]:
        """Number and bytes of all blobs."""
        async with self._database.read() as connection:
            table = tables.blob
            row = (await connection.execute(select(func.count(), func.coalesce(func.sum(table.c.size_bytes), 0)))).one()
        return int(row[0]), int(row[1])


async def known_in(connection: AsyncConnection, repo: Repo, digests: Iterable[str]) -> dict[str, int]:
    """As `Ledger.known`, inside a transaction: until it ends, gc waits for these rows."""
    wanted = sorted(set(digests))
    blob, repo_blob = tables.blob, tables.repo_blob
    found: dict[str, int] = {}
    for start in range(0, len(wanted), _MAX_VARIABLES):
        part = wanted[start : start + _MAX_VARIABLES]
        allowed = select(repo_blob.c.sha256).where(repo_blob.c.repo == repo.key, repo_blob.c.sha256.in_(part))
        rows = await connection.execute(
            update(blob)
            .where(blob.c.sha256.in_(allowed), blob.c.state == READY)
            .values(touched_at=time.time())
            .returning(blob.c.sha256, blob.c.size_bytes)
        )
        found |= {row.sha256: row.size_bytes for row in rows.all()}
    return found
