"""What a store of blobs must do, for a folder and for S3 alike. Knows no database and nobody's rights."""

import contextlib
import hashlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from loractl.adapters.errors import BadData, BlobCorrupt, WillNotFit

BLOCK_BYTES = 1 << 20
"""Reads go block by block, each checked against its CRC-32 before a byte of it is sent."""


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """A blob that is durable in the store."""

    sha256: str
    size_bytes: int
    block_crc32: bytes


@dataclass(frozen=True, slots=True)
class ReceivedBlob:
    """Bytes that have arrived whole and are not yet under their name."""

    blob: StoredBlob
    handle: str
    """Where the store keeps them meanwhile."""


@dataclass(frozen=True, slots=True)
class ListedBlob:
    """A blob as a listing shows it."""

    sha256: str
    size_bytes: int
    modified_at: float


def disk_full() -> WillNotFit:
    """The refusal of what finds no room, for blobs and for the database beside them."""
    return WillNotFit("the hub's disk is full", hint="free space on the hub, or run `loractl hub gc`")


class Hasher:
    """All that is computed of a blob while it passes: sha256, size, CRC-32 of each block."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._crcs = bytearray()
        self._crc = 0
        self._in_block = 0
        self.size_bytes = 0

    def update(self, data: bytes | memoryview) -> None:
        self._sha256.update(data)
        self.size_bytes += len(data)
        view = memoryview(data)
        while view:
            part = view[: BLOCK_BYTES - self._in_block]
            self._crc = zlib.crc32(part, self._crc)
            self._in_block += len(part)
            if self._in_block == BLOCK_BYTES:
                self._end_block()
            view = view[len(part) :]

    @property
    def sha256(self) -> str:
        """The hash of what has passed so far."""
        return self._sha256.hexdigest()

    def _end_block(self) -> None:
        self._crcs += self._crc.to_bytes(4, "little")
        self._crc = self._in_block = 0

    def finish(self, *, sha256: str | None, size_bytes: int | None) -> StoredBlob:
        """Compare with what was announced; raises BadData when the bytes are others."""
        if self._in_block:
            self._end_block()
        found = self._sha256.hexdigest()
        if size_bytes is not None and size_bytes != self.size_bytes:
            raise BadData(f"{self.size_bytes} bytes arrived where {size_bytes} were announced")
        if sha256 is not None and sha256 != found:
            raise BadData(f"the bytes have sha256 {found}, announced was {sha256}")
        return StoredBlob(found, self.size_bytes, bytes(self._crcs))


class BlobStore(ABC):
    """Content-addressed bytes, and a staging area for the parts of uploads. All methods may raise Unreachable.

    A blob is written once under its sha256 and never changed. Staged parts are named by their session and are gone
    with it; nobody but the upload that made them reads them.
    """

    name: str

    @abstractmethod
    def receive(
        self, chunks: AsyncIterable[bytes], *, sha256: str | None = None, size_bytes: int | None = None
    ) -> "contextlib.AbstractAsyncContextManager[ReceivedBlob]":
        """Take bytes and hash them on the way; they wait, durable but not yet a blob, until the block ends.

        Raises BadData when size or hash are not those announced, WillNotFit when the store is full.
        """

    @abstractmethod
    async def publish(self, received: "ReceivedBlob") -> None:
        """Make what was received a blob; durable when this returns. Call it while the blob's row is locked."""

    @abstractmethod
    def read(self, sha256: str, *, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        """Read bytes [start, stop) in pieces of at most a block, unchecked. Raises BlobMissing."""

    @abstractmethod
    async def size(self, sha256: str) -> int | None:
        """Size in bytes of a blob, or None where it is absent."""

    @abstractmethod
    async def delete(self, sha256: str) -> None:
        """Remove a blob; nothing happens when it is absent."""

    @abstractmethod
    def list_blobs(self) -> AsyncIterator[ListedBlob]:
        """Every blob in the store, in no order."""

    @abstractmethod
    def local_copy(self, sha256: str) -> "contextlib.AbstractAsyncContextManager[Path]":
        """A path to read the blob from while the block lasts; a link where the store is local. Raises BlobMissing."""

    @abstractmethod
    async def stage(self, session: str, part: str, chunks: AsyncIterable[bytes], *, max_bytes: int) -> int:
        """Keep one part of an upload, in place of one of that name; its size. Raises WillNotFit beyond `max_bytes`."""

    @abstractmethod
    def staged_copy(self, session: str, part: str) -> "contextlib.AbstractAsyncContextManager[Path]":
        """A path to read a staged part from. Raises BlobMissing."""

    @abstractmethod
    async def staged_size(self, session: str, part: str) -> int | None:
        """Size in bytes of a staged part, or None."""

    @abstractmethod
    async def drop_stage(self, session: str) -> None:
        """Forget all parts of an upload."""

    @abstractmethod
    async def sweep_stage(self, *, before: float) -> int:
        """Remove what was staged and not touched since the unix time `before`; returns how many things went."""

    @abstractmethod
    async def free_bytes(self) -> int | None:
        """Room that is left, or None where the store has no end."""

    @abstractmethod
    async def is_alive(self) -> bool:
        """Whether the store answers and can be written."""


async def checked_blocks(store: BlobStore, blob: StoredBlob, *, start: int, stop: int) -> AsyncIterator[bytes]:
    """Read [start, stop) of a blob, every block compared with its CRC-32 before any byte of it is given out.

    Raises BlobCorrupt at the first block that is not what was pushed, BlobMissing when the blob is shorter or absent.
    """
    first = start // BLOCK_BYTES
    position = first * BLOCK_BYTES
    pending = bytearray()
    stop_read = min(-(-stop // BLOCK_BYTES) * BLOCK_BYTES, blob.size_bytes)
    async for piece in store.read(blob.sha256, start=position, stop=stop_read):
        pending += piece
        while len(pending) >= BLOCK_BYTES or (pending and position + len(pending) >= stop_read):
            block = bytes(pending[:BLOCK_BYTES])
            del pending[:BLOCK_BYTES]
            index = position // BLOCK_BYTES
            if zlib.crc32(block).to_bytes(4, "little") != blob.block_crc32[4 * index : 4 * index + 4]:
                raise BlobCorrupt(f"blob {blob.sha256} is damaged in block {index}", hint="run `loractl hub fsck`")
            yield block[max(start - position, 0) : stop - position]
            position += len(block)
    if position < stop_read:
        raise BlobCorrupt(f"blob {blob.sha256} ends early", hint="run `loractl hub fsck`")
