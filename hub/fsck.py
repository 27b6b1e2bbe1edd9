"""Looks whether everything that the database promises is in the store, byte for byte. Changes nothing.

channel, tag -> commit -> files -> blob row -> bytes (size, sha256)        and back: bytes without a row
"""

from dataclasses import dataclass, field

from sqlalchemy import select

from loractl.adapters.errors import BlobMissing
from loractl.hub import tables
from loractl.hub.blobs.store import Hasher
from loractl.hub.registry.ledger import READY
from loractl.hub.services import Hub


@dataclass(slots=True)
class Report:
    """What was looked at and what is wrong."""

    num_blobs: int = 0
    num_bytes: int = 0
    num_commits: int = 0
    missing: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    broken_refs: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    """Bytes without a row; harmless, gc takes them."""

    @property
    def is_sound(self) -> bool:
        return not (self.missing or self.corrupt or self.broken_refs)


async def check(hub: Hub, *, read_data: bool = True) -> Report:
    """Walk everything; `read_data=False` compares sizes only, which takes seconds instead of minutes."""
    report = Report()
    await _check_rows(hub, report)
    async with hub.database.read() as connection:
        rows = (await connection.execute(select(tables.blob).where(tables.blob.c.state == READY))).all()
    known = {row.sha256: row.size_bytes for row in rows}
    for sha256, size_bytes in known.items():
        report.num_blobs += 1
        report.num_bytes += size_bytes
        await _check_blob(hub, sha256, size_bytes, report, read_data=read_data)
    report.orphans = [found.sha256 async for found in hub.store.list_blobs() if found.sha256 not in known]
    return report


async def _check_blob(hub: Hub, sha256: str, size_bytes: int, report: Report, *, read_data: bool) -> None:
    found = await hub.store.size(sha256)
    if found is None:
        report.missing.append(sha256)
    elif found != size_bytes:
        report.corrupt.append(sha256)
    elif read_data:
        hasher = Hasher()
        try:
            async for piece in hub.store.read(sha256):
                hasher.update(piece)
        except BlobMissing:
            report.missing.append(sha256)
            return
        if hasher.sha256 != sha256:
            report.corrupt.append(sha256)


async def _check_rows(hub: Hub, report: Report) -> None:
    ref, commit, entry, blob = tables.ref, tables.commit, tables.tree_entry, tables.blob
    async with hub.database.read() as connection:
        commits = set((await connection.execute(select(commit.c.oid))).scalars())
        report.num_commits = len(commits)
        for row in await connection.execute(select(ref.c.repo, ref.c.name, ref.c.commit_oid)):
            if row.commit_oid not in commits:
                report.broken_refs.append(f"repo {row.repo}: {row.name} -> {row.commit_oid}")
        lost = (
            select(entry.c.commit_oid, entry.c.path, entry.c.sha256)
            .select_from(entry.outerjoin(blob, (blob.c.sha256 == entry.c.sha256) & (blob.c.state == READY)))
            .where(blob.c.sha256.is_(None))
        )
        report.missing += [row.sha256 for row in await connection.execute(lost)]
