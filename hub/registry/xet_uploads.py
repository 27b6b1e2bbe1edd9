"""Rebuilds files from what a Xet session sent, and keeps them as ordinary blobs. Knows the format, no route."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

from loractl.adapters.errors import BadData, BlobMissing, WillNotFit
from loractl.hub.blobs.store import BLOCK_BYTES, BlobStore
from loractl.hub.registry.ledger import Ledger
from loractl.hub.registry.records import Repo
from loractl.hub.settings import HubSettings
from loractl.hub.xet_format import Chunk, Segment, ShardFile, read_chunk_table, read_shard, unpack_chunk

XET_HASH = re.compile(r"[0-9a-f]{64}")


class XetUploads:
    """Checks xorbs as they come, and turns shards into blobs."""

    def __init__(self, store: BlobStore, ledger: Ledger, settings: HubSettings) -> None:
        self._store = store
        self._ledger = ledger
        self._settings = settings

    async def check_xorb(self, session: str, name: str) -> None:
        """Raise BadData unless the staged xorb keeps to the format's limits."""
        async with self._store.staged_copy(session, name) as path:
            await asyncio.to_thread(read_chunk_table, path)

    async def take_shard(self, repo: Repo, session: str, data: bytes) -> int:
        """Rebuild and keep every file of a shard; returns how many. Raises BadData, WillNotFit."""
        files = await asyncio.to_thread(read_shard, data)
        for file in files:
            if file.size_bytes > self._settings.max_file_bytes:
                raise WillNotFit(f"a file of {file.size_bytes:,} bytes is over the hub's limit")
            await self._ledger.keep(repo, self._rebuilt(session, file), sha256=file.sha256, size_bytes=file.size_bytes)
        return len(files)

    async def _rebuilt(self, session: str, file: ShardFile) -> AsyncIterator[bytes]:
        tables: dict[str, list[Chunk]] = {}
        async with contextlib.AsyncExitStack() as stack:
            paths: dict[str, Path] = {}
            for segment in file.segments:
                name = segment.xorb
                if name not in paths:
                    try:
                        paths[name] = await stack.enter_async_context(self._store.staged_copy(session, name))
                    except BlobMissing as error:
                        raise BadData(f"the shard names xorb {name}, which this session has not sent") from error
                    tables[name] = await asyncio.to_thread(read_chunk_table, paths[name])
                chunks = _run(tables[name], segment)
                for group in _groups(chunks):
                    yield await asyncio.to_thread(_unpack, paths[name], group)


def _run(table: list[Chunk], segment: Segment) -> list[Chunk]:
    chunks = table[segment.first : segment.end]
    if segment.end > len(table) or sum(chunk.raw_bytes for chunk in chunks) != segment.num_bytes:
        raise BadData(f"the shard's run of chunks does not fit xorb {segment.xorb}")
    return chunks


def _groups(chunks: list[Chunk]) -> list[list[Chunk]]:
    """Runs of about a block, so that one thread call does a block's work."""
    groups: list[list[Chunk]] = [[]]
    size = 0
    for chunk in chunks:
        if size >= BLOCK_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(chunk)
        size += chunk.raw_bytes
    return groups


def _unpack(path: Path, chunks: list[Chunk]) -> bytes:
    with path.open("rb") as stream:
        return b"".join(unpack_chunk(stream, chunk) for chunk in chunks)
