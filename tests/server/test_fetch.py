"""Names become folders once, soon, and also while the hub is away."""

import asyncio
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest

from fake_hub import BASE, FakeHub
from loractl.adapters.digest import CONFIG_FILE, WEIGHTS_FILE, adapter_digest
from loractl.adapters.errors import BaseMismatch, Overloaded, RepoNotFound, Unreachable
from loractl.adapters.local_cache import AdapterCache
from loractl.adapters.reference import AdapterRef
from loractl.server.fetch.from_hub import FromHub
from loractl.server.fetch.hub_calls import FetchLimits
from loractl.server.fetch.hub_reader import HubReader
from loractl.server.fetch.source import AdapterSource


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def hub(tmp_path: Path) -> FakeHub:
    return FakeHub(tmp_path)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def source(hub: FakeHub, clock: Clock) -> Any:
    # A busy machine must not look like a slow hub.
    patient = FetchLimits(resolve_timeout_s=60.0, stale_wait_s=60.0)
    source = AdapterSource(local={}, hub=FromHub(hub, limits=patient, clock=clock), base_fingerprint=BASE)
    yield source
    await source.close()


async def test_herd_for_one_cold_adapter_makes_one_lookup_and_one_download(source: AdapterSource, hub: FakeHub) -> None:
    found = await asyncio.gather(*(source.find("team/a@prod") for _ in range(500)))
    assert len(hub.resolves) == len(hub.fetches) == 1
    assert len({each.digest for each in found}) == 1


async def test_moved_channel_is_seen_within_two_seconds(source: AdapterSource, hub: FakeHub, clock: Clock) -> None:
    before = await source.find("team/a@prod")
    hub.digits["team/a"] = "9"
    assert (await source.find("team/a@prod")).digest == before.digest
    clock.now += 2.0
    after = await source.find("team/a@prod")
    assert after.digest == "sha256:" + "9" * 64
    assert before.folder.is_dir()


async def test_known_adapter_keeps_serving_while_the_hub_is_down(
    source: AdapterSource, hub: FakeHub, clock: Clock
) -> None:
    before = await source.find("team/a")
    hub.is_down = True
    for _ in range(10):
        clock.now += 60
        assert (await source.find("team/a")).digest == before.digest
    assert source.hub_is_up is False
    with pytest.raises(Unreachable) as caught:
        await source.find("team/b")
    assert caught.value.retry_after_s
    hub.is_down = False
    clock.now += 10
    assert (await source.find("team/b")).digest
    assert source.hub_is_up is True


async def test_open_breaker_answers_without_asking(source: AdapterSource, hub: FakeHub) -> None:
    hub.is_down = True
    for _ in range(20):
        with pytest.raises(Unreachable):
            await source.find("team/b")
    assert len(hub.resolves) == 3


async def test_adapter_on_the_disk_serves_after_a_restart_without_the_hub(
    source: AdapterSource, hub: FakeHub, tmp_path: Path
) -> None:
    hub.remembered = hub.resolve(AdapterRef("team", "a"))
    folder = tmp_path / hub.remembered.digest[7:]
    folder.mkdir()
    hub.is_down = True
    assert source.hub is not None
    for _ in range(3):
        source.hub.calls.breaker.failed()
    assert (await source.find("team/a")).folder == folder


def test_reader_notes_what_a_name_meant_and_forgets_what_left_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: FakeHub
) -> None:
    cache = AdapterCache(tmp_path / "cache")
    config, weights = b"{}", b"weights"
    digest = adapter_digest(
        config_sha256=hashlib.sha256(config).hexdigest(), weights_sha256=hashlib.sha256(weights).hexdigest()
    )

    def fill(folder: Path) -> None:
        (folder / CONFIG_FILE).write_bytes(config)
        (folder / WEIGHTS_FILE).write_bytes(weights)

    cache.put(digest, fill)
    ref = AdapterRef("team", "a", "prod")
    answer = dataclasses.replace(hub.resolve(ref), digest=digest)
    reader = HubReader("http://127.0.0.1:9", token=None, cache=cache)
    monkeypatch.setattr(reader._client, "resolve", lambda ref: answer)
    assert reader.recall(ref) is None
    reader.resolve(ref)
    again = HubReader("http://127.0.0.1:9", token=None, cache=cache)
    assert again.recall(ref) == answer
    cache.evict(digest)
    assert again.recall(ref) is None
    reader.close()
    again.close()


async def test_silent_hub_is_a_503_before_long(hub: FakeHub) -> None:
    hub.delay_s = 0.5
    limits = FetchLimits(resolve_timeout_s=0.05)
    source = AdapterSource(local={}, hub=FromHub(hub, limits=limits), base_fingerprint=BASE)
    with pytest.raises(Unreachable):
        await source.find("team/a")
    await source.close()


async def test_unknown_name_is_asked_once_and_forgotten_in_time(
    source: AdapterSource, hub: FakeHub, clock: Clock
) -> None:
    for _ in range(5):
        with pytest.raises(RepoNotFound):
            await source.find("team/new")
    assert len(hub.resolves) == 1
    hub.digits["team/new"] = "3"
    clock.now += 11
    assert (await source.find("team/new")).digest


async def test_memory_of_unknown_names_is_bounded(hub: FakeHub, clock: Clock) -> None:
    limits = FetchLimits(max_negative=50, max_lookups_per_s=1e9, resolve_timeout_s=60.0)
    adapters = FromHub(hub, limits=limits, clock=clock)
    source = AdapterSource(local={}, hub=adapters, base_fingerprint=BASE)
    for number in range(200):
        with pytest.raises(RepoNotFound):
            await source.find(f"team/x{number}")
    assert adapters.names.num_missing == 50
    await source.close()


async def test_flood_of_new_names_is_held_from_the_hub(source: AdapterSource, hub: FakeHub) -> None:
    refusals: list[type[Exception]] = []
    for number in range(150):
        try:
            await source.find(f"team/x{number}")
        except (RepoNotFound, Overloaded) as error:
            refusals.append(type(error))
    assert refusals.count(Overloaded) == 50
    assert len(hub.resolves) == 100


async def test_adapter_of_another_base_is_refused(source: AdapterSource, hub: FakeHub) -> None:
    hub.fingerprint = "sha256:" + "0" * 64
    with pytest.raises(BaseMismatch) as caught:
        await source.find("team/a")
    assert (caught.value.status, caught.value.field) == (422, "model")
    assert not hub.fetches


@pytest.mark.parametrize("name", ["gpt-4", "../etc/passwd", "http://x/y", "team/a@../b", "a/b/c", "team/\x00"])
async def test_name_that_is_no_reference_never_reaches_the_hub(source: AdapterSource, hub: FakeHub, name: str) -> None:
    with pytest.raises(RepoNotFound):
        await source.find(name)
    assert not hub.resolves
