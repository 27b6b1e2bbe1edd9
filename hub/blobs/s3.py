"""Blobs in a bucket that speaks S3. Knows keys and retries, no database and nobody's rights.

    s3://bucket/prefix/
      blobs/sha256/ab/cd/abcd...      one object per blob, written once by a server-side copy
      staging/write-<random>          a blob on its way: hashed while it is sent, in parts, then copied to its place
      staging/<session>/<part>        parts of an upload in progress

A blob appears whole or not at all, since S3 shows an object only when it is complete. Conditional writes are not
needed: two writers of one blob write equal bytes, whose hash was compared before, and the row in the database that
makes them count is locked meanwhile. So any store that can put, copy, list and delete will do.
"""

import asyncio
import contextlib
import os
import secrets
import tempfile
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from loractl.adapters.errors import BlobMissing, Unreachable, UsageError, WillNotFit
from loractl.hub.blobs.store import BLOCK_BYTES, BlobStore, Hasher, ListedBlob, ReceivedBlob
from loractl.hub.failpoints import reach

if TYPE_CHECKING:
    from obstore.store import S3Config, S3Store

_PART_BYTES = 8 << 20
"""Of an upload, and of one ranged read: S3 takes at least 5 MiB for a part, and each in flight is held in memory."""
_PARTS_AT_ONCE = 3
_COPY_LIMIT_BYTES = 5 << 30
"""S3 copies no larger object in one request."""
_ALIVE_FOR_S = 10.0
"""How long a yes of `is_alive` is believed, unless a request fails: a probe writes an object, and probes come from
everywhere."""
_PROBE_TIMEOUT_S = 5.0


class S3BlobStore(BlobStore):
    """A bucket of blobs; see the drawing above."""

    name = "s3"

    def __init__(self, store: "S3Store", *, address: str) -> None:
        self._store = store
        self._address = address
        self._alive_until = 0.0

    @contextlib.asynccontextmanager
    async def receive(
        self, chunks: AsyncIterable[bytes], *, sha256: str | None = None, size_bytes: int | None = None
    ) -> AsyncIterator[ReceivedBlob]:
        hasher = Hasher()
        key = f"staging/write-{secrets.token_hex(12)}"
        try:
            await self._put(key, _Counted(chunks, hasher, max_bytes=size_bytes))
            yield ReceivedBlob(hasher.finish(sha256=sha256, size_bytes=size_bytes), key)
        except Unreachable:
            # A sweep finds it: the client need not wait until a store that fails has failed once more.
            raise
        except BaseException:
            await self._forget(key)
            raise
        await self._forget(key)

    async def _forget(self, key: str) -> None:
        # Should this fail, a sweep finds it.
        with contextlib.suppress(Unreachable, BlobMissing):
            await self._delete([key])

    async def publish(self, received: ReceivedBlob) -> None:
        import obstore

        reach("blob-before-rename")
        key = _blob_key(received.blob.sha256)
        if received.blob.size_bytes > _COPY_LIMIT_BYTES:
            await self._put(key, _Counted(self._pieces(received.handle), Hasher(), max_bytes=None))
        else:
            with self._translated():
                await obstore.copy_async(self._store, received.handle, key)
        reach("blob-after-rename")

    async def read(self, sha256: str, *, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        async for piece in self._pieces(_blob_key(sha256), start=start, stop=stop):
            view = memoryview(piece)
            for position in range(0, len(view), BLOCK_BYTES):
                yield bytes(view[position : position + BLOCK_BYTES])

    async def _pieces(self, key: str, *, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        """Read in ranges, the next one under way while one is used: each can be retried by itself."""
        if stop is None:
            stop = await self._size(key)
            if stop is None:
                raise _missing(key)
        ranges = [(at, min(at + _PART_BYTES, stop)) for at in range(start, stop, _PART_BYTES)]
        ahead: asyncio.Task[bytes] | None = None
        try:
            for index, _ in enumerate(ranges):
                task = ahead or asyncio.create_task(self._get_range(key, *ranges[index]))
                following = ranges[index + 1 : index + 2]
                ahead = asyncio.create_task(self._get_range(key, *following[0])) if following else None
                yield await task
        finally:
            if ahead is not None:
                ahead.cancel()
                with contextlib.suppress(asyncio.CancelledError, Unreachable, BlobMissing):
                    await ahead

    async def _get_range(self, key: str, start: int, stop: int) -> bytes:
        import obstore

        with self._translated():
            found = await obstore.get_range_async(self._store, key, start=start, end=stop)
        return found.to_bytes()

    async def size(self, sha256: str) -> int | None:
        return await self._size(_blob_key(sha256))

    async def _size(self, key: str) -> int | None:
        import obstore

        try:
            with self._translated():
                return (await obstore.head_async(self._store, key))["size"]
        except BlobMissing:
            return None

    async def delete(self, sha256: str) -> None:
        with contextlib.suppress(BlobMissing):
            await self._delete([_blob_key(sha256)])

    async def _delete(self, keys: list[str]) -> None:
        import obstore

        with self._translated():
            await obstore.delete_async(self._store, keys)

    async def list_blobs(self) -> AsyncIterator[ListedBlob]:
        async for key, size_bytes, modified_at in self._list("blobs/sha256/"):
            yield ListedBlob(key.rpartition("/")[2], size_bytes, modified_at)

    async def _list(self, prefix: str) -> AsyncIterator[tuple[str, int, float]]:
        import obstore

        with self._translated():
            async for found in obstore.list(self._store, prefix=prefix, chunk_size=1000):
                for meta in found:
                    yield meta["path"], meta["size"], meta["last_modified"].timestamp()

    def local_copy(self, sha256: str) -> "contextlib.AbstractAsyncContextManager[Path]":
        return self._copy_to_disk(_blob_key(sha256))

    @contextlib.asynccontextmanager
    async def _copy_to_disk(self, key: str) -> AsyncIterator[Path]:
        with tempfile.TemporaryDirectory(prefix="loractl-hub-") as folder:
            path = Path(folder) / "blob"
            with path.open("wb") as stream:
                async for piece in self._pieces(key):
                    await asyncio.to_thread(stream.write, piece)
            yield path

    async def stage(self, session: str, part: str, chunks: AsyncIterable[bytes], *, max_bytes: int) -> int:
        counted = _Counted(chunks, None, max_bytes=max_bytes)
        await self._put(f"staging/{session}/{part}", counted)
        return counted.size_bytes

    def staged_copy(self, session: str, part: str) -> "contextlib.AbstractAsyncContextManager[Path]":
        return self._copy_to_disk(f"staging/{session}/{part}")

    async def staged_size(self, session: str, part: str) -> int | None:
        return await self._size(f"staging/{session}/{part}")

    async def drop_stage(self, session: str) -> None:
        keys = [key async for key, _, _ in self._list(f"staging/{session}/")]
        with contextlib.suppress(BlobMissing):
            await self._delete(keys)

    async def sweep_stage(self, *, before: float) -> int:
        newest: dict[str, float] = {}
        keys: dict[str, list[str]] = {}
        async for key, _, modified_at in self._list("staging/"):
            thing = key.split("/")[1]
            newest[thing] = max(modified_at, newest.get(thing, 0.0))
            keys.setdefault(thing, []).append(key)
        swept = [thing for thing, modified_at in newest.items() if modified_at < before]
        for thing in swept:
            with contextlib.suppress(BlobMissing):
                await self._delete(keys[thing])
        return len(swept)

    async def free_bytes(self) -> int | None:
        return None

    async def is_alive(self) -> bool:
        if time.monotonic() < self._alive_until:
            return True
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                await self.probe()
        except (Unreachable, BlobMissing, TimeoutError):
            return False
        self._alive_until = time.monotonic() + _ALIVE_FOR_S
        return True

    async def probe(self) -> None:
        """Write, read and remove a small object. Raises Unreachable, BlobMissing when the bucket is not there."""
        import obstore

        key = f"staging/probe-{secrets.token_hex(8)}"
        with self._translated():
            await obstore.put_async(self._store, key, key.encode(), use_multipart=False)
            await obstore.get_range_async(self._store, key, start=0, end=len(key))
            await obstore.delete_async(self._store, key)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Errors of the store as ours; after one of them `is_alive` asks anew."""
        from obstore.exceptions import BaseError, NotFoundError, PermissionDeniedError, UnauthenticatedError

        try:
            yield
        except (NotFoundError, FileNotFoundError) as error:
            raise BlobMissing(f"an object is not in {self._address}", hint="run `loractl hub fsck`") from error
        except (PermissionDeniedError, UnauthenticatedError) as error:
            self._alive_until = 0.0
            raise Unreachable(
                f"{self._address} refuses the hub's credentials",
                hint="AWS_ACCESS_KEY_ID and its like",
                retry_after_s=30.0,
            ) from error
        except (BaseError, OSError) as error:
            self._alive_until = 0.0
            raise Unreachable(f"{self._address} does not answer as it should", retry_after_s=5.0) from error

    async def _put(self, key: str, counted: "_Counted") -> None:
        """Send a stream: one request when it is small, else parts of which a few are in memory at a time."""
        import obstore

        head = await counted.take(_PART_BYTES)
        try:
            with self._translated():
                if counted.is_done:
                    await obstore.put_async(self._store, key, head, use_multipart=False)
                    return
                await obstore.put_async(
                    self._store,
                    key,
                    counted.rest(head),
                    use_multipart=True,
                    chunk_size=_PART_BYTES,
                    max_concurrency=_PARTS_AT_ONCE,
                )
        except Unreachable:
            # obstore wraps what the stream itself raised.
            if counted.failure is not None:
                raise counted.failure from None
            raise


class _Counted:
    """A stream that is counted, hashed and bounded while it passes, and remembers how it broke."""

    def __init__(self, chunks: AsyncIterable[bytes], hasher: Hasher | None, *, max_bytes: int | None) -> None:
        self._chunks = aiter(chunks)
        self._hasher = hasher
        self._max_bytes = max_bytes
        self.size_bytes = 0
        self.is_done = False
        self.failure: BaseException | None = None

    async def take(self, num_bytes: int) -> bytes:
        """At least `num_bytes`, or all there is."""
        taken = bytearray()
        while len(taken) < num_bytes and not self.is_done:
            try:
                chunk = await anext(self._chunks)
            except StopAsyncIteration:
                self.is_done = True
                break
            self.size_bytes += len(chunk)
            if self._max_bytes is not None and self.size_bytes > self._max_bytes:
                raise WillNotFit(f"more bytes arrive than the {self._max_bytes} that were announced or are allowed")
            taken += chunk
        if self._hasher is not None and taken:
            await asyncio.to_thread(self._hasher.update, bytes(taken))
        return bytes(taken)

    async def rest(self, head: bytes) -> AsyncIterator[bytes]:
        """Give `head` and all that follows it, about a block at a time."""
        yield head
        while not self.is_done:
            try:
                piece = await self.take(BLOCK_BYTES)
            except BaseException as error:
                self.failure = error
                raise
            if piece:
                yield piece


def _blob_key(sha256: str) -> str:
    return f"blobs/sha256/{sha256[:2]}/{sha256[2:4]}/{sha256}"


def _missing(key: str) -> BlobMissing:
    return BlobMissing(f"object {key} is not in the store", hint="run `loractl hub fsck`")


async def open_s3(url: str, *, timeout_s: float = 20.0) -> S3BlobStore:
    """Open `s3://bucket/prefix` with the usual `AWS_*` variables, and write to it once.

    Raises UsageError for a wrong address or a bucket that is not there, Unreachable when it does not answer.
    """
    try:
        from obstore.store import S3Store
    except ImportError as error:
        raise UsageError(f"--blobs {url} needs the extra", hint="pip install 'loractl[s3]'") from error
    parts = urlsplit(url)
    if not parts.netloc or parts.query or parts.fragment or parts.username:
        raise UsageError(f"--blobs {url} is not an address", hint="s3://bucket/prefix, credentials in AWS_* variables")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config: S3Config = {"endpoint": endpoint} if endpoint else {}
    store = S3Store(
        parts.netloc,
        prefix=parts.path.strip("/") or None,
        config=config | {"checksum_algorithm": "SHA256"},
        client_options={
            "timeout": timedelta(seconds=max(timeout_s, 0.1)),
            "connect_timeout": timedelta(seconds=min(max(timeout_s, 0.1), 5.0)),
            # Only where the operator wrote http:// for the endpoint; credentials are signed, not sent.
            "allow_http": bool(endpoint) and str(endpoint).startswith("http://"),
        },
        retry_config={
            "max_retries": 5,
            "retry_timeout": timedelta(seconds=timeout_s),
            "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=3), "base": 2},
        },
    )
    found = S3BlobStore(store, address=f"s3://{parts.netloc}")
    try:
        await found.probe()
    except BlobMissing as error:
        raise UsageError(f"--blobs {url}: there is no such bucket", hint="make it first") from error
    return found
