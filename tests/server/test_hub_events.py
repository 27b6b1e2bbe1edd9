"""A server that follows a live hub's events: moved channels count at once, and a silent hub changes nothing."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from fake_hub import FakeHub, digest_of, resolved
from live_hub import LiveHub, live_hub
from loractl.adapters.digest import folder_digest
from loractl.adapters.errors import RepoNotFound
from loractl.adapters.local_cache import AdapterCache
from loractl.adapters.reference import AdapterRef
from loractl.hub.client_records import ResolvedAdapter
from loractl.server.fetch.from_hub import FromHub
from loractl.server.fetch.hub_calls import FetchLimits
from loractl.server.fetch.hub_events import HubEvents
from loractl.server.fetch.hub_reader import HubReader
from loractl.server.fetch.known_names import KnownNames
from loractl.server.fetch.source import AdapterSource
from pushing import push
from tiny_models import make_adapter, make_tiny_base

# Without events a name would be believed for an hour.
_PATIENT = FetchLimits(fresh_s=3600.0, usable_s=3600.0, told_s=3600.0, resolve_timeout_s=10.0, stale_wait_s=10.0)
_BASE = "sha256:" + "0" * 64


class _CountingReader(HubReader):
    """Counts how often the hub was asked for a name."""

    num_resolves = 0

    def resolve(self, ref: AdapterRef) -> ResolvedAdapter:
        self.num_resolves += 1
        return super().resolve(ref)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("followed")
    base = make_tiny_base(root / "base")
    return [make_adapter(base, root / f"adapter-{seed}", seed=seed) for seed in (1, 2)]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LiveHub]:
    with live_hub(tmp_path / "hub", event_heartbeat_s=0.2) as running:
        yield running


@pytest.fixture
def reader(hub: LiveHub, tmp_path: Path) -> Iterator[_CountingReader]:
    cache = AdapterCache(tmp_path / "cache")
    with contextlib.closing(_CountingReader(hub.url, token=hub.admin, cache=cache, resolve_timeout_s=10.0)) as counting:
        yield counting


@pytest.fixture
async def source(reader: _CountingReader) -> AsyncIterator[AdapterSource]:
    source = AdapterSource(local={}, hub=FromHub(reader, limits=_PATIENT), base_fingerprint=_BASE)
    yield source
    await source.close()


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.02)


def _names(source: AdapterSource) -> KnownNames:
    assert source.hub is not None
    return source.hub.names


async def _is_told(source: AdapterSource) -> bool:
    return _names(source).is_told


async def test_moved_channel_is_followed_by_its_event_alone(
    hub: LiveHub, reader: _CountingReader, source: AdapterSource, folders: list[Path]
) -> None:
    first, second = folders
    await asyncio.to_thread(push, hub, first)
    events = HubEvents(_names(source), hub.url, token=hub.admin)
    events.start()
    await _until(lambda: _is_told(source))
    assert (await source.find("team/name")).digest == folder_digest(first)
    await asyncio.to_thread(push, hub, second)

    async def has_moved() -> bool:
        return (await source.find("team/name")).digest == folder_digest(second)

    await _until(has_moved)
    assert reader.num_resolves == 2
    await events.close()


async def test_name_that_was_missing_is_found_as_soon_as_it_is_pushed(
    hub: LiveHub, source: AdapterSource, folders: list[Path]
) -> None:
    events = HubEvents(_names(source), hub.url, token=hub.admin)
    events.start()
    await _until(lambda: _is_told(source))
    with pytest.raises(RepoNotFound):
        await source.find("team/new")
    await asyncio.to_thread(push, hub, folders[0], "team/new")

    async def is_found() -> bool:
        try:
            return (await source.find("team/new")).digest == folder_digest(folders[0])
        except RepoNotFound:
            return False

    await _until(is_found)
    await events.close()


async def test_channel_that_moved_while_the_hub_was_away_is_found_when_it_is_back(
    tmp_path: Path, folders: list[Path]
) -> None:
    first, second = folders
    root = tmp_path / "hub"
    async with _hub_beside(root) as before:
        port = int(before.url.rpartition(":")[2])
        await asyncio.to_thread(push, before, first)
        reader = HubReader(
            before.url, token=before.admin, cache=AdapterCache(tmp_path / "cache"), resolve_timeout_s=10.0
        )
        source = AdapterSource(local={}, hub=FromHub(reader, limits=_PATIENT), base_fingerprint=_BASE)
        events = HubEvents(_names(source), before.url, token=before.admin)
        events.start()
        await _until(lambda: _is_told(source))
        assert (await source.find("team/name")).digest == folder_digest(first)

    async def is_alone() -> bool:
        return not _names(source).is_told

    await _until(is_alone)
    assert (await source.find("team/name")).digest == folder_digest(first)
    async with _hub_beside(root) as elsewhere:
        # The same hub on another port: moved without anybody listening.
        await asyncio.to_thread(push, elsewhere, second, token=before.admin)
    async with _hub_beside(root, listen_port=port):
        await _until(lambda: _is_told(source))
        assert (await source.find("team/name")).digest == folder_digest(second)
        await events.close()
    await source.close()
    reader.close()


@contextlib.asynccontextmanager
async def _hub_beside(root: Path, *, listen_port: int = 0) -> AsyncIterator[LiveHub]:
    """A live hub that starts and stops beside this loop, which goes on."""
    running = live_hub(root, listen_port=listen_port, event_heartbeat_s=0.2)
    hub = await asyncio.to_thread(running.__enter__)
    try:
        yield hub
    finally:
        await asyncio.to_thread(running.__exit__, None, None, None)


async def test_answer_that_a_change_has_overtaken_is_not_kept(tmp_path: Path) -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    class Slow(FakeHub):
        def resolve(self, ref: AdapterRef) -> ResolvedAdapter:
            answer = resolved(ref, digest_of(self.digits["team/name"]))
            loop.call_soon_threadsafe(asked.set)
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(10)
            return answer

    hub = Slow(tmp_path)
    hub.digits["team/name"] = "1"
    source = AdapterSource(local={}, hub=FromHub(hub, limits=_PATIENT), base_fingerprint=_BASE)
    _names(source).is_told = True
    early = asyncio.create_task(source.find("team/name"))
    await asked.wait()
    hub.digits["team/name"] = "2"
    _names(source).forget("team/name")
    go_on.set()
    await early
    assert (await source.find("team/name")).digest == digest_of("2")
    await source.close()
