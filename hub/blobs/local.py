"""Blobs in a folder. Knows files and fsync, no network and no database.

    root/
      blobs/sha256/ab/cd/abcd...      one file per blob, written once, mode 0444
      staging/write-<random>          a blob on its way: hashed while written, fsynced, then renamed to its place
      staging/<session>/<part>        parts of an upload in progress

A blob appears by rename after its bytes are on the disk, and the folder is fsynced before anybody is told: a crash
leaves either the whole blob or a staged file that a sweep removes.
"""

import asyncio
import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path

from loractl.adapters.errors import BlobMissing, Unreachable, WillNotFit
from loractl.hub.blobs.store import BLOCK_BYTES, BlobStore, Hasher, ListedBlob, ReceivedBlob, disk_full
from loractl.hub.failpoints import reach

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class LocalBlobStore(BlobStore):
    """A folder of blobs; see the drawing above."""

    name = "local"

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs" / "sha256"
        self._staging = root / "staging"
        self._durable: set[Path] = set()
        root.mkdir(parents=True, exist_ok=True)
        for folder in (root / "blobs", self._blobs, self._staging):
            self._make_durable(folder)

    def _path(self, sha256: str) -> Path:
        return self._blobs / sha256[:2] / sha256[2:4] / sha256

    @contextlib.asynccontextmanager
    async def receive(
        self, chunks: AsyncIterable[bytes], *, sha256: str | None = None, size_bytes: int | None = None
    ) -> AsyncIterator[ReceivedBlob]:
        hasher = Hasher()
        staged = self._staging / f"write-{secrets.token_hex(12)}"
        try:
            try:
                await _write_all(staged, chunks, hasher=hasher, max_bytes=size_bytes)
            except OSError as error:
                raise _translated(error) from error
            yield ReceivedBlob(hasher.finish(sha256=sha256, size_bytes=size_bytes), str(staged))
        finally:
            staged.unlink(missing_ok=True)

    async def publish(self, received: ReceivedBlob) -> None:
        try:
            await asyncio.to_thread(self._publish, Path(received.handle), received.blob.sha256)
        except OSError as error:
            raise _translated(error) from error

    def _publish(self, staged: Path, sha256: str) -> None:
        path = self._path(sha256)
        for folder in (path.parent.parent, path.parent):
            self._make_durable(folder)
        reach("blob-before-rename")
        # Also over an equal file that is there: should that one be damaged, a push repairs it.
        staged.chmod(0o444)
        staged.replace(path)
        reach("blob-after-rename")
        _sync_folder(path.parent)

    def _make_durable(self, folder: Path) -> None:
        """Make a folder and see it on the disk, once: one that is there may be what a crash or a neighbour began."""
        if folder not in self._durable:
            folder.mkdir(exist_ok=True)
            _sync_folder(folder.parent)
            self._durable.add(folder)

    async def read(self, sha256: str, *, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        try:
            stream = await asyncio.to_thread(self._path(sha256).open, "rb", buffering=0)
        except FileNotFoundError as error:
            raise BlobMissing(f"blob {sha256} is not in the store", hint="run `loractl hub fsck`") from error
        except OSError as error:
            raise _translated(error) from error
        with stream:
            await asyncio.to_thread(stream.seek, start)
            left = None if stop is None else stop - start
            while left is None or left > 0:
                wanted = BLOCK_BYTES if left is None else min(BLOCK_BYTES, left)
                data = await asyncio.to_thread(stream.read, wanted)
                if not data:
                    return
                left = None if left is None else left - len(data)
                yield data

    async def size(self, sha256: str) -> int | None:
        try:
            return self._path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    async def delete(self, sha256: str) -> None:
        path = self._path(sha256)
        with contextlib.suppress(FileNotFoundError):
            await asyncio.to_thread(path.unlink)

    async def list_blobs(self) -> AsyncIterator[ListedBlob]:
        for folder in await asyncio.to_thread(lambda: sorted(self._blobs.glob("*/*"))):
            for found in await asyncio.to_thread(_listed, folder):
                yield found

    @contextlib.asynccontextmanager
    async def local_copy(self, sha256: str) -> AsyncIterator[Path]:
        path = self._path(sha256)
        if not path.exists():
            raise BlobMissing(f"blob {sha256} is not in the store", hint="run `loractl hub fsck`")
        yield path

    async def stage(self, session: str, part: str, chunks: AsyncIterable[bytes], *, max_bytes: int) -> int:
        folder = self._staging / session
        hasher = _Counter()
        staged = folder / f".{part}-{secrets.token_hex(6)}"
        try:
            folder.mkdir(exist_ok=True)
            await _write_all(staged, chunks, hasher=hasher, max_bytes=max_bytes)
            staged.replace(folder / part)
        except OSError as error:
            raise _translated(error) from error
        finally:
            with contextlib.suppress(OSError):
                staged.unlink(missing_ok=True)
        return hasher.size_bytes

    @contextlib.asynccontextmanager
    async def staged_copy(self, session: str, part: str) -> AsyncIterator[Path]:
        path = self._staging / session / part
        if not path.exists():
            raise BlobMissing(f"part {part} of the upload is not here", hint="upload again")
        yield path

    async def staged_size(self, session: str, part: str) -> int | None:
        path = self._staging / session / part
        return path.stat().st_size if path.exists() else None

    async def drop_stage(self, session: str) -> None:
        await asyncio.to_thread(shutil.rmtree, self._staging / session, ignore_errors=True)

    async def sweep_stage(self, *, before: float) -> int:
        return await asyncio.to_thread(self._sweep, before)

    def _sweep(self, before: float) -> int:
        num_swept = 0
        for path in list(self._staging.iterdir()):
            with contextlib.suppress(FileNotFoundError):
                newest = max([path.stat().st_mtime, *(inner.stat().st_mtime for inner in path.glob("*"))])
                if newest < before:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                    num_swept += 1
        return num_swept

    async def free_bytes(self) -> int | None:
        return shutil.disk_usage(self._staging).free

    async def is_alive(self) -> bool:
        return await asyncio.to_thread(os.access, self._staging, os.W_OK | os.X_OK)


class _Counter(Hasher):
    """Counts the bytes of a part, whose hash nobody knows yet."""

    def update(self, data: bytes | memoryview) -> None:
        self.size_bytes += len(data)


async def _write_all(path: Path, chunks: AsyncIterable[bytes], *, hasher: Hasher, max_bytes: int | None) -> None:
    """Write and hash in a thread, about a block at a time, while the next one arrives; fsynced when this returns."""
    stream = await asyncio.to_thread(path.open, "xb", buffering=0)
    writing: asyncio.Future[None] | None = None
    with stream:
        pending = bytearray()
        num_bytes = 0
        try:
            async for chunk in chunks:
                pending += chunk
                num_bytes += len(chunk)
                if max_bytes is not None and num_bytes > max_bytes:
                    raise WillNotFit(f"more bytes arrive than the {max_bytes} that were announced or are allowed")
                if len(pending) >= BLOCK_BYTES:
                    full, pending = pending, bytearray()
                    if writing is not None:
                        await writing
                    writing = asyncio.ensure_future(asyncio.to_thread(_write_piece, stream.fileno(), full, hasher))
        finally:
            # Also when the client left: the file is not closed under a thread that writes to it.
            if writing is not None:
                await asyncio.shield(writing)
        await asyncio.to_thread(_write_piece, stream.fileno(), pending, hasher)
        reach("blob-before-fsync")
        await asyncio.to_thread(os.fsync, stream.fileno())


def _write_piece(descriptor: int, data: bytearray, hasher: Hasher) -> None:
    with memoryview(data) as view:
        written = 0
        while written < len(view):
            written += os.write(descriptor, view[written:])
        hasher.update(view)


def _listed(folder: Path) -> list[ListedBlob]:
    found: list[ListedBlob] = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found.append(ListedBlob(path.name, status.st_size, status.st_mtime))
    return found


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _translated(error: OSError) -> Exception:
    if error.errno in _FULL:
        return disk_full()
    return Unreachable(f"the hub's storage fails: {os.strerror(error.errno or 0)}", retry_after_s=5.0)
