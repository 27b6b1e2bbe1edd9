"""A canary as callers of the server meet it: a share of them, always the same ones, counted apart, gone in a moment."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fake_hub import digest_of, resolved
from live_hub import LiveHub, live_hub
from loractl.adapters.digest import folder_digest
from loractl.adapters.errors import Unreachable
from loractl.adapters.local_cache import AdapterCache
from loractl.adapters.reference import AdapterRef, Digest, parse_reference
from loractl.hub.client import HubClient
from loractl.hub.client_records import ResolvedAdapter, ResolvedCanary
from loractl.server.access import Access
from loractl.server.fetch.canary import is_chosen
from loractl.server.fetch.from_hub import FromHub
from loractl.server.fetch.hub_events import HubEvents
from loractl.server.fetch.hub_reader import HubReader
from loractl.server.fetch.source import AdapterSource
from loractl.server.metrics import OTHER, ServerMetrics
from pushing import push
from tiny_models import make_adapter, make_tiny_base

_PROD = "team/name@prod"


def _version(name: str, *, canary: ResolvedCanary | None = None) -> ResolvedAdapter:
    digit = name.removeprefix("v")
    ref = AdapterRef("team", "name", "prod")
    return resolved(ref, digest_of(digit), commit=digit * 40, version=name, canary=canary)


def test_share_of_callers_is_what_was_asked_for_and_only_grows() -> None:
    callers = [f"blue\0person {number}" for number in range(20_000)]
    five = {each for each in callers if is_chosen(each, ResolvedCanary(share=0.05, adapter=_version("v4")))}
    twenty = {each for each in callers if is_chosen(each, ResolvedCanary(share=0.2, adapter=_version("v4")))}
    # Six standard deviations of a fair draw.
    assert abs(len(five) - 1000) < 6 * (20_000 * 0.05 * 0.95) ** 0.5
    assert abs(len(twenty) - 4000) < 6 * (20_000 * 0.2 * 0.8) ** 0.5
    assert five < twenty
    next_time = {each for each in callers if is_chosen(each, ResolvedCanary(share=0.05, adapter=_version("v5")))}
    assert len(five & next_time) < len(five) / 4


class _HubInMemory:
    """Knows `prod` alone, with half of the callers on a canary that cannot be downloaded when `is_broken`."""

    def __init__(self, folder: Path, *, is_broken: bool = False) -> None:
        self.folder = folder
        self.is_broken = is_broken

    def resolve(self, ref: object) -> ResolvedAdapter:
        del ref
        return _version("v3", canary=ResolvedCanary(share=0.5, adapter=_version("v4")))

    def recall(self, ref: object) -> ResolvedAdapter | None:
        del ref
        return None

    def cached(self, resolved: ResolvedAdapter) -> Path | None:
        del resolved
        return None

    def fetch(self, resolved: ResolvedAdapter) -> Path:
        if self.is_broken and resolved.version == "v4":
            raise Unreachable("the file is not there")
        return self.folder


async def _ask(live: Any, *, user: str = "", key: str = "") -> Any:
    body: dict[str, Any] = {"model": _PROD, "prompt": "x", "max_tokens": 3}
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return await live.http.post("/v1/completions", json=body | ({"user": user} if user else {}), headers=headers)


async def test_person_stays_with_one_version_and_both_are_counted(start_server: Any, tmp_path: Path) -> None:
    live = await start_server(hub=_HubInMemory(tmp_path))
    first = [(await _ask(live, user=f"u{number}")).headers["x-loractl-version"] for number in range(24)]
    again = [(await _ask(live, user=f"u{number}")).headers["x-loractl-version"] for number in range(24)]
    assert first == again
    assert {"v3", "v4"} == set(first)
    page = (await live.http.get("/metrics")).text
    for version, track in (("v3", "stable"), ("v4", "canary")):
        labels = f'{{adapter="{_PROD}",track="{track}",version="{version}"}}'
        num_asked = 2 * first.count(version)
        assert f"loractl_server_canary_requests_total{labels} {num_asked:.1f}" in page
        assert f"loractl_server_canary_generation_tokens_total{labels} {3 * num_asked:.1f}" in page
        assert f"loractl_server_canary_request_seconds_total{labels}" in page
    routing = (await live.http.get("/metrics/routing")).text
    assert f'running_lora_adapters="{_PROD}"' in routing


async def test_key_without_users_stays_with_one_version(start_server: Any, tmp_path: Path) -> None:
    keys = [f"some-key-{number:08d}" for number in range(16)]
    (tmp_path / "keys").write_text("".join(f"{key} team-{key[-2:]}\n" for key in keys))
    live = await start_server(hub=_HubInMemory(tmp_path), access=Access.from_file(tmp_path / "keys"))
    rounds = [[(await _ask(live, key=key)).headers["x-loractl-version"] for key in keys] for _ in range(3)]
    assert rounds[0] == rounds[1] == rounds[2]
    assert {"v3", "v4"} == set(rounds[0])


async def test_canary_that_cannot_be_had_costs_nobody_an_answer(start_server: Any, tmp_path: Path) -> None:
    live = await start_server(hub=_HubInMemory(tmp_path, is_broken=True))
    answers = [await _ask(live, user=f"u{number}") for number in range(8)]
    assert [answer.status_code for answer in answers] == [200] * 8
    assert {answer.headers["x-loractl-version"] for answer in answers} == {"v3"}


def test_labels_of_canaries_are_bounded() -> None:
    metrics = ServerMetrics(max_adapter_labels=3)
    labels = [metrics.track_labels("team/name@prod", f"v{number}", "canary") for number in range(9)]
    assert labels[2] == ("team/name@prod", "v2", "canary")
    assert set(labels[3:]) == {(OTHER, OTHER, "canary")}


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[LiveHub]:
    running = live_hub(tmp_path / "hub", event_heartbeat_s=0.2)
    yield await asyncio.to_thread(running.__enter__)
    await asyncio.to_thread(running.__exit__, None, None, None)


async def test_running_server_follows_a_canary_and_its_end_by_events(hub: LiveHub, tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base")
    first, second = (make_adapter(base, tmp_path / f"a{seed}", seed=seed) for seed in (1, 2))
    await asyncio.to_thread(lambda: [push(hub, folder) for folder in (first, second)])
    reader = HubReader(hub.url, token=hub.admin, cache=AdapterCache(tmp_path / "cache"), resolve_timeout_s=10.0)
    adapters = FromHub(reader)
    source = AdapterSource(local={}, hub=adapters, base_fingerprint="sha256:" + "0" * 64)
    events = HubEvents(adapters.names, hub.url, token=hub.admin)
    events.start()
    callers = [f"blue\0u{number}" for number in range(40)]

    async def served() -> set[Digest]:
        return {(await source.find(_PROD, caller=caller)).digest for caller in callers}

    with HubClient(hub.url, hub.admin) as client:
        v2, prod = parse_reference("team/name@v2"), parse_reference("team/name@prod")
        await asyncio.to_thread(client.promote, parse_reference("team/name@v1"), "prod")
        assert await served() == {folder_digest(first)}
        steps: list[tuple[Any, set[Digest]]] = [
            (lambda: client.promote(v2, "prod", share=0.5), {folder_digest(first), folder_digest(second)}),
            (lambda: client.rollback(prod, "prod"), {folder_digest(first)}),
            (lambda: client.promote(v2, "prod", share=0.5), {folder_digest(first), folder_digest(second)}),
            (lambda: client.promote(v2, "prod"), {folder_digest(second)}),
        ]
        for step, expected in steps:
            await asyncio.to_thread(step)
            async with asyncio.timeout(20):
                while await served() != expected:
                    await asyncio.sleep(0.02)
    await events.close()
    await source.close()
    reader.close()
