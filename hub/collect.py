"""Takes away what nothing names any more: expired uploads, unreferenced blobs, bytes without a row. Knows no request.

Safe beside pushes: a blob goes only while its row is locked, and an upload locks that row to put bytes in place.
"""

import time
from dataclasses import dataclass

from sqlalchemy import delete, exists, select, update
from sqlalchemy.dialects import postgresql, sqlite

from loractl.hub import tables
from loractl.hub.failpoints import reach
from loractl.hub.registry.ledger import DELETING, READY
from loractl.hub.services import Hub

_BATCH = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What one run took away."""

    num_blobs: int
    num_bytes: int
    num_orphans: int
    num_uploads: int
    num_staged: int


async def collect(hub: Hub, *, grace_s: float) -> Collected:
    """Remove everything that nothing has named or touched for `grace_s` seconds."""
    # Taken before anything is looked at: what is touched from here on stays, with a grace of zero too.
    cutoff = time.time() - grace_s
    num_uploads = await hub.uploads.close_expired()
    num_staged = await hub.store.sweep_stage(before=time.time() - max(grace_s, hub.settings.upload_ttl_s))
    num_blobs = num_bytes = 0
    await _mark(hub, cutoff)
    while marked := await _marked(hub):
        for sha256, size_bytes in marked:
            if await _take_away(hub, sha256):
                num_blobs += 1
                num_bytes += size_bytes
    num_orphans = await _take_orphans(hub, cutoff)
    return Collected(
        num_blobs=num_blobs,
        num_bytes=num_bytes,
        num_orphans=num_orphans,
        num_uploads=num_uploads,
        num_staged=num_staged,
    )


async def _mark(hub: Hub, cutoff: float) -> None:
    """Turn unreferenced old blobs to `deleting`; from here on nobody may build on them."""
    blob, entry = tables.blob, tables.tree_entry
    is_named = exists(select(entry.c.sha256).where(entry.c.sha256 == blob.c.sha256))
    async with hub.database.write() as connection:
        await connection.execute(
            update(blob).where(blob.c.state == READY, blob.c.touched_at < cutoff, ~is_named).values(state=DELETING)
        )
    reach("gc-after-mark")


async def _marked(hub: Hub) -> list[tuple[str, int]]:
    blob = tables.blob
    async with hub.database.read() as connection:
        query = select(blob.c.sha256, blob.c.size_bytes).where(blob.c.state == DELETING).limit(_BATCH)
        return [(row.sha256, row.size_bytes) for row in (await connection.execute(query)).all()]


async def _take_away(hub: Hub, sha256: str) -> bool:
    """Remove bytes and row while the row is locked; False when an upload has revived it meanwhile."""
    blob = tables.blob
    async with hub.database.write() as connection:
        gone = await connection.execute(delete(blob).where(blob.c.sha256 == sha256, blob.c.state == DELETING))
        if gone.rowcount != 1:
            return False
        await hub.store.delete(sha256)
        reach("gc-after-unlink")
    return True


async def _take_orphans(hub: Hub, cutoff: float) -> int:
    """Remove bytes that have no row: what a crash left between putting them in place and the end of the transaction."""
    blob = tables.blob
    num_orphans = 0
    async for found in hub.store.list_blobs():
        if found.modified_at >= cutoff:
            continue
        async with hub.database.write() as connection:
            dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
            # A row of our own keeps uploads of the same bytes waiting while they are taken away.
            made = await connection.execute(
                dialect.insert(blob)
                .values(sha256=found.sha256, size_bytes=0, state=DELETING, touched_at=0.0, block_crc32=b"")
                .on_conflict_do_nothing()
                .returning(blob.c.sha256)
            )
            if made.first() is None:
                continue
            await hub.store.delete(found.sha256)
            await connection.execute(delete(blob).where(blob.c.sha256 == found.sha256))
            num_orphans += 1
    return num_orphans
