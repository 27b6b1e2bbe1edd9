"""What every store of blobs promises, on a folder and on a real S3 server."""

import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from live_s3 import LiveS3
from loractl.adapters.errors import BadData, BlobMissing, Unreachable, UsageError, WillNotFit
from loractl.hub.blobs.s3 import open_s3
from loractl.hub.blobs.store import BlobStore
from loractl.hub.services import open_store
from loractl.hub.settings import HubSettings

SMALL = b"a few bytes"
# More than one part of an upload and one range of a download, and no multiple of either.
LARGE = bytes(range(251)) * 90_000


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
async def store(tmp_path: Path, request: pytest.FixtureRequest) -> BlobStore:
    blobs = request.getfixturevalue("s3").url(tmp_path.name) if request.param == "s3" else None
    return await open_store(HubSettings(root=tmp_path, blobs=blobs))


async def _chunks(data: bytes, size: int = 70_001) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def _keep(store: BlobStore, data: bytes) -> str:
    sha256 = hashlib.sha256(data).hexdigest()
    async with store.receive(_chunks(data), sha256=sha256, size_bytes=len(data)) as received:
        await store.publish(received)
    return sha256


async def _read(store: BlobStore, sha256: str, start: int = 0, stop: int | None = None) -> bytes:
    return b"".join([piece async for piece in store.read(sha256, start=start, stop=stop)])


@pytest.mark.parametrize("data", [b"", SMALL, LARGE], ids=["empty", "small", "large"])
async def test_blob_comes_back_whole_and_in_ranges(store: BlobStore, data: bytes) -> None:
    sha256 = await _keep(store, data)
    assert await _read(store, sha256) == data
    assert await store.size(sha256) == len(data)
    assert [found.sha256 async for found in store.list_blobs()] == [sha256]
    for start, stop in [(0, 1), (3, 9), (len(data) // 2, len(data))]:
        if stop <= len(data):
            assert await _read(store, sha256, start, stop) == data[start:stop]
    async with store.local_copy(sha256) as path:
        assert path.read_bytes() == data


async def test_bytes_with_another_hash_or_size_leave_nothing(store: BlobStore) -> None:
    for sha256, size_bytes in (("0" * 64, None), (None, len(LARGE) + 1)):
        with pytest.raises(BadData):
            async with store.receive(_chunks(LARGE), sha256=sha256, size_bytes=size_bytes):
                raise AssertionError("these bytes were not announced")
    with pytest.raises(WillNotFit):
        async with store.receive(_chunks(LARGE), size_bytes=1000):
            raise AssertionError("these are too many")
    assert [found async for found in store.list_blobs()] == []
    assert await store.sweep_stage(before=time.time() + 60.0) == 0


async def test_broken_upload_raises_what_broke_it(store: BlobStore) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield LARGE
        raise BadData("the client went away")

    with pytest.raises(BadData, match="went away"):
        async with store.receive(broken()):
            raise AssertionError("nothing arrived")
    assert await store.sweep_stage(before=time.time() + 60.0) == 0


async def test_blob_is_seen_only_once_published(store: BlobStore) -> None:
    async with store.receive(_chunks(SMALL)) as received:
        assert await store.size(received.blob.sha256) is None
    assert await store.size(received.blob.sha256) is None


async def test_missing_blob_is_said_to_be_missing(store: BlobStore) -> None:
    with pytest.raises(BlobMissing):
        await _read(store, "ab" * 32)
    with pytest.raises(BlobMissing):
        async with store.local_copy("ab" * 32):
            raise AssertionError("there is no such blob")
    await store.delete("ab" * 32)
    sha256 = await _keep(store, SMALL)
    await store.delete(sha256)
    assert await store.size(sha256) is None


async def test_staged_parts_are_replaced_bounded_and_swept(store: BlobStore) -> None:
    assert await store.stage("session", "00001", _chunks(SMALL), max_bytes=100) == len(SMALL)
    assert await store.stage("session", "00001", _chunks(LARGE), max_bytes=len(LARGE)) == len(LARGE)
    assert await store.staged_size("session", "00001") == len(LARGE)
    async with store.staged_copy("session", "00001") as path:
        assert path.read_bytes() == LARGE
    with pytest.raises(WillNotFit):
        await store.stage("session", "00002", _chunks(LARGE), max_bytes=100)
    assert await store.staged_size("session", "00002") is None
    assert await store.sweep_stage(before=time.time() - 3600.0) == 0
    assert await store.sweep_stage(before=time.time() + 60.0) == 1
    assert await store.staged_size("session", "00001") is None
    await store.stage("other", "00001", _chunks(SMALL), max_bytes=100)
    await store.drop_stage("other")
    await store.drop_stage("other")
    assert await store.staged_size("other", "00001") is None
    assert await store.is_alive()


@pytest.mark.slow
async def test_s3_that_refuses_or_is_away_is_told_apart(s3: LiveS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(Unreachable, match="refuses the hub's credentials"):
        await open_s3(s3.url("prefix"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match="does not answer"):
        await open_s3(s3.url("prefix"))


@pytest.mark.parametrize("address", ["s3://", "s3://bucket?x=1", "s3://me:secret@bucket/x", "gs://bucket"])
async def test_address_that_is_no_bucket_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        await open_store(HubSettings(root=tmp_path, blobs=address))
