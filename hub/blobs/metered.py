"""Another store, with the time that it takes and the errors that it makes counted. Knows no folder and no S3.

Time spent waiting for a client, who sends or takes bytes, is not the store's and is left out.
"""

import contextlib
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from pathlib import Path

from loractl.adapters.errors import BadData, LoractlError
from loractl.hub.blobs.store import BlobStore, ListedBlob, ReceivedBlob
from loractl.hub.metrics import HubMetrics


class _Clock:
    """Seconds between `start` and `stop`, added up."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self._started


class MeteredBlobStore(BlobStore):
    """Hands everything on to `inner`."""

    def __init__(self, inner: BlobStore, metrics: HubMetrics) -> None:
        self._inner = inner
        self._metrics = metrics
        self.name = inner.name

    @contextlib.contextmanager
    def _counted(self, operation: str) -> Iterator[_Clock]:
        clock = _Clock()
        clock.start()
        try:
            yield clock
        except LoractlError as error:
            # Bytes that are not those announced are the client's mistake.
            if not isinstance(error, BadData):
                self._metrics.storage_errors.labels(op=operation, code=error.code).inc()
            raise
        finally:
            clock.stop()
            self._metrics.storage_seconds.labels(op=operation, backend=self.name).observe(clock.seconds)

    @contextlib.asynccontextmanager
    async def receive(
        self, chunks: AsyncIterable[bytes], *, sha256: str | None = None, size_bytes: int | None = None
    ) -> AsyncIterator[ReceivedBlob]:
        async with contextlib.AsyncExitStack() as stack:
            with self._counted("receive") as clock:
                coming = self._inner.receive(_unclocked(chunks, clock), sha256=sha256, size_bytes=size_bytes)
                received = await stack.enter_async_context(coming)
            yield received

    async def publish(self, received: ReceivedBlob) -> None:
        with self._counted("publish"):
            await self._inner.publish(received)

    async def read(self, sha256: str, *, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        with self._counted("read") as clock:
            async for piece in self._inner.read(sha256, start=start, stop=stop):
                clock.stop()
                try:
                    yield piece
                finally:
                    clock.start()

    async def size(self, sha256: str) -> int | None:
        with self._counted("size"):
            return await self._inner.size(sha256)

    async def delete(self, sha256: str) -> None:
        with self._counted("delete"):
            await self._inner.delete(sha256)

    async def list_blobs(self) -> AsyncIterator[ListedBlob]:
        with self._counted("list") as clock:
            async for found in self._inner.list_blobs():
                clock.stop()
                try:
                    yield found
                finally:
                    clock.start()

    @contextlib.asynccontextmanager
    async def local_copy(self, sha256: str) -> AsyncIterator[Path]:
        async with contextlib.AsyncExitStack() as stack:
            with self._counted("copy"):
                path = await stack.enter_async_context(self._inner.local_copy(sha256))
            yield path

    async def stage(self, session: str, part: str, chunks: AsyncIterable[bytes], *, max_bytes: int) -> int:
        with self._counted("stage") as clock:
            return await self._inner.stage(session, part, _unclocked(chunks, clock), max_bytes=max_bytes)

    @contextlib.asynccontextmanager
    async def staged_copy(self, session: str, part: str) -> AsyncIterator[Path]:
        async with contextlib.AsyncExitStack() as stack:
            with self._counted("copy"):
                path = await stack.enter_async_context(self._inner.staged_copy(session, part))
            yield path

    async def staged_size(self, session: str, part: str) -> int | None:
        with self._counted("size"):
            return await self._inner.staged_size(session, part)

    async def drop_stage(self, session: str) -> None:
        with self._counted("delete"):
            await self._inner.drop_stage(session)

    async def sweep_stage(self, *, before: float) -> int:
        with self._counted("delete"):
            return await self._inner.sweep_stage(before=before)

    async def free_bytes(self) -> int | None:
        return await self._inner.free_bytes()

    async def is_alive(self) -> bool:
        return await self._inner.is_alive()


async def _unclocked(chunks: AsyncIterable[bytes], clock: _Clock) -> AsyncIterator[bytes]:
    """The same chunks, with the clock standing still while the next one is waited for."""
    clock.stop()
    try:
        async for chunk in chunks:
            clock.start()
            yield chunk
            clock.stop()
    finally:
        clock.start()
