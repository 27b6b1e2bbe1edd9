"""The event stream of a live hub: what it tells, to whom, what was missed, and what is no longer kept."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from live_hub import LiveHub, live_hub
from live_postgres import LivePostgres
from loractl.adapters.errors import NotAllowed
from loractl.hub.event_client import Gone, Lost, Ready, Told, follow_events
from loractl.hub.registry.journal import KINDS
from loractl.hub.services import open_hub
from loractl.hub.settings import HubSettings
from loractl.hub.wire import HubEvent
from pushing import push

_EVENTS = "/api/loractl/v1/events"
_PLACE = "/api/loractl/v1/adapters/team/name"


def _page(http: httpx.Client, **params: Any) -> list[dict[str, Any]]:
    answer = http.get(_EVENTS, params=params)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["events"])


def _kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["kind"] for event in events]


def _follow(
    hub: LiveHub, *, until: int = 1000, until_ready: bool = False, after: int | None = None, token: str | None = None
) -> list[Told]:
    """Follow until so many things were told, or the stream is ready."""

    async def follow() -> list[Told]:
        found: list[Told] = []
        async with asyncio.timeout(20):
            async for told in follow_events(hub.url, token or hub.admin, after=after):
                found.append(told)
                if len(found) >= until or (until_ready and isinstance(told, Ready)):
                    break
        return found

    return asyncio.run(follow())


def test_every_change_of_a_repo_is_an_event_in_its_order(hub: LiveHub, adapter: Path) -> None:
    oid = push(hub, adapter)
    api = hub.api()
    api.create_tag("team/name", tag="release", revision="v1")
    api.delete_tag("team/name", tag="release")
    with hub.http() as http:
        http.post(f"{_PLACE}/promote", json={"channel": "prod", "revision": "v1"})
        http.post(f"{_PLACE}/protect", json={"channel": "prod"})
        http.post(f"{_PLACE}/yank", json={"revision": "v1", "reason": "wrong data"})
        http.post(f"{_PLACE}/yank", json={"revision": "v1", "reason": None})
        api.update_repo_settings("team/name", private=True)
        api.move_repo("team/name", "team/other")
        api.delete_repo("team/other")
        made = http.post("/api/loractl/v1/tokens", json={"name": "ci", "roles": ["read"]}).json()["token"]["id"]
        http.delete(f"/api/loractl/v1/tokens/{made}")
        events = _page(http)
    assert _kinds(events) == [
        *("token.created", "repo.created", "version.created", "channel.moved", "tag.created", "tag.deleted"),
        *("channel.moved", "channel.protected", "version.yanked", "version.unyanked", "repo.visibility"),
        *("repo.moved", "repo.deleted", "token.created", "token.revoked"),
    ]
    # The one that takes two versions is seen in test_canary.py.
    assert set(_kinds(events)) == set(KINDS) - {"channel.canary"}
    numbers = [event["id"] for event in events]
    assert numbers == sorted(set(numbers))
    assert events[2]["data"]["commit"] == events[3]["data"]["new"] == oid
    assert events[11] | {"id": 0, "at": ""} == {
        "id": 0, "at": "", "kind": "repo.moved", "repo_id": "team/other", "data": {"from": "team/name"},
    }  # fmt: skip
    assert hub.admin not in json.dumps(events)


def test_events_are_told_to_those_alone_who_may_see_the_repo(hub: LiveHub) -> None:
    api = hub.api()
    api.create_repo("team/open")
    api.create_repo("team/secret", private=True)
    api.create_repo("team/hidden-later")
    api.update_repo_settings("team/hidden-later", private=True)
    with (
        hub.http(hub.token("read", pattern="elsewhere/*")) as other,
        hub.http(hub.token("read", pattern="team/*")) as own,
    ):
        assert {event["repo_id"] for event in _page(other)} == {"team/open"}
        assert {event["repo_id"] for event in _page(own)} == {"team/open", "team/secret", "team/hidden-later"}
    with hub.http("") as nobody:
        assert nobody.get(_EVENTS).status_code == 401


def test_filters_narrow_what_is_told(hub: LiveHub, adapter: Path) -> None:
    push(hub, adapter)
    hub.api().create_repo("lab/other")
    with hub.http() as http:
        assert _kinds(_page(http, repo="team/*", kind=["version.created", "repo.created"])) == [
            "repo.created",
            "version.created",
        ]
        assert _kinds(_page(http, repo="lab/other")) == ["repo.created"]
        assert _kinds(_page(http, kind="channel.moved", channel="prod")) == []
        refused = http.get(_EVENTS, params={"kind": "nothing"})
    assert (refused.status_code, refused.json()["field"]) == (400, "kind")


def test_pages_lead_through_all_events(hub: LiveHub) -> None:
    for number in range(5):
        hub.api().create_repo(f"team/n{number}")
    found: list[int] = []
    with hub.http() as http:
        after = 0
        while (page := http.get(_EVENTS, params={"after": after, "limit": 2}).json())["events"]:
            found += [event["id"] for event in page["events"]]
            after = page["next_after"]
        assert found == [event["id"] for event in _page(http)]


def test_stream_tells_what_was_missed_then_ready_then_what_comes(hub: LiveHub) -> None:
    hub.api().create_repo("team/before")
    later = threading.Timer(0.5, lambda: hub.api().create_repo("team/after"))
    later.start()
    told = _follow(hub, after=0, until=4)
    later.join()
    assert [one.kind if isinstance(one, HubEvent) else type(one) for one in told] == [
        *("token.created", "repo.created"),
        Ready,
        "repo.created",
    ]
    assert [one.repo_id for one in told if isinstance(one, HubEvent)] == [None, "team/before", "team/after"]


def test_stream_without_a_start_begins_now(hub: LiveHub) -> None:
    hub.api().create_repo("team/before")
    assert isinstance(_follow(hub, until=1)[0], Ready)


def test_last_event_id_counts_as_after(hub: LiveHub) -> None:
    hub.api().create_repo("team/a")
    with hub.http() as http:
        first = _page(http)[0]["id"]
        headers = {"accept": "text/event-stream", "last-event-id": str(first)}
        with http.stream("GET", _EVENTS, headers=headers) as stream:
            lines = stream.iter_lines()
            assert next(lines) == "event: repo.created"
            assert int(next(lines).removeprefix("id: ")) > first
        assert http.get(_EVENTS, headers=headers | {"last-event-id": "x"}).status_code == 400


def test_follower_catches_up_after_the_hub_was_down(tmp_path: Path) -> None:
    """The events of the time without connection come first, none twice, none lost."""
    told: list[Told] = []
    with live_hub(tmp_path / "hub", event_heartbeat_s=0.2) as before:
        port = int(before.url.rpartition(":")[2])
        stop = threading.Event()
        follower = threading.Thread(target=_collect, args=(before.url, before.admin, told, stop))
        follower.start()
        _wait_for(told, Ready)
        before.api().create_repo("team/one")
        _wait_for(told, HubEvent)
    _wait_for(told, Lost)
    asyncio.run(_create_offline(before.settings, "team/two"))
    with live_hub(tmp_path / "hub", listen_port=port) as after:
        after.api(before.admin).create_repo("team/three")
        try:
            names = _wait_for_names(told, 3)
        finally:
            stop.set()
            follower.join(20)
    assert names == ["team/one", "team/two", "team/three"]


def _collect(url: str, token: str, told: list[Told], stop: threading.Event) -> None:
    async def follow() -> None:
        async for one in follow_events(url, token):
            told.append(one)  # noqa: PERF401 - the others read along

    async def main() -> None:
        task = asyncio.create_task(follow())
        while not stop.is_set():
            await asyncio.sleep(0.02)
        task.cancel()

    asyncio.run(main())


def _wait_for(told: list[Told], kind: type) -> None:
    deadline = time.monotonic() + 20
    while not any(isinstance(one, kind) for one in told):
        assert time.monotonic() < deadline, told
        time.sleep(0.02)


def _wait_for_names(told: list[Told], number: int) -> list[str | None]:
    deadline = time.monotonic() + 20
    while True:
        names = [one.repo_id for one in list(told) if isinstance(one, HubEvent) and one.kind == "repo.created"]
        if len(names) >= number or time.monotonic() > deadline:
            return names
        time.sleep(0.02)


async def _create_offline(settings: HubSettings, repo_id: str) -> None:
    from loractl.hub.actor import SYSTEM

    async with open_hub(settings) as hub:
        namespace, _, name = repo_id.partition("/")
        await hub.repos.create(namespace, name, private=False, actor=SYSTEM)


def test_events_that_are_no_longer_kept_are_gone_and_the_follower_starts_afresh(hub: LiveHub) -> None:
    for name in ("a", "b", "c"):
        hub.api().create_repo(f"team/{name}")

    async def prune() -> int:
        async with open_hub(hub.settings) as opened:
            return await opened.events.prune(before=time.time() + 1)

    assert asyncio.run(prune()) == 3
    with hub.http() as http:
        kept = _page(http)
        assert [event["repo_id"] for event in kept] == ["team/c"]
        for headers in ({}, {"accept": "text/event-stream"}):
            gone = http.get(_EVENTS, params={"after": 1}, headers=headers)
            assert (gone.status_code, gone.json()["code"]) == (410, "EVENTS_GONE")
            assert "afresh" in gone.json()["hint"]
        # A number from the future: this hub was set back to an older state.
        assert http.get(_EVENTS, params={"after": 10_000}).status_code == 410
    told = _follow(hub, after=1, until=2)
    assert isinstance(told[0], Gone)
    assert isinstance(told[1], Ready)


def test_numbers_grow_on_when_old_events_are_taken_away(hub: LiveHub) -> None:
    async def prune() -> None:
        async with open_hub(hub.settings) as opened:
            await opened.events.prune(before=time.time() + 1)

    hub.api().create_repo("team/a")
    with hub.http() as http:
        before = _page(http)[-1]["id"]
        asyncio.run(prune())
        asyncio.run(prune())
        hub.api().create_repo("team/b")
        assert _page(http)[-1]["id"] > before


@pytest.fixture
def quick_hub(tmp_path: Path) -> Iterator[LiveHub]:
    with live_hub(tmp_path / "quick", event_heartbeat_s=0.1, max_event_streams=1) as running:
        yield running


def test_stream_ends_when_its_token_is_revoked(quick_hub: LiveHub) -> None:
    with quick_hub.http() as http:
        made = http.post("/api/loractl/v1/tokens", json={"name": "ci", "roles": ["read"]}).json()
        with (
            quick_hub.http(made["secret"]) as own,
            own.stream("GET", _EVENTS, headers={"accept": "text/event-stream"}) as stream,
        ):
            lines = stream.iter_lines()
            assert next(lines) == "event: ready"
            http.delete(f"/api/loractl/v1/tokens/{made['token']['id']}")
            assert list(lines)[-1] == ""
    told = _follow(quick_hub, until=1, token=made["secret"])
    assert isinstance(told[0], Lost)
    assert isinstance(told[0].error, NotAllowed)


def test_streams_beyond_the_limit_are_refused_and_a_place_is_free_when_one_leaves(quick_hub: LiveHub) -> None:
    headers = {"accept": "text/event-stream"}
    with quick_hub.http() as http:
        with http.stream("GET", _EVENTS, headers=headers) as stream:
            lines = stream.iter_lines()
            next(lines)
            with quick_hub.http() as another:
                refused = another.get(_EVENTS, headers=headers)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        # The first try may come before the hub has seen that the other left.
        assert any(isinstance(one, Ready) for one in _follow(quick_hub, until_ready=True))


def test_silence_is_filled_with_heartbeats(quick_hub: LiveHub) -> None:
    with quick_hub.http() as http, http.stream("GET", _EVENTS, headers={"accept": "text/event-stream"}) as stream:
        lines = stream.iter_lines()
        assert any(line == ":" for _, line in zip(range(20), lines, strict=False))


@pytest.mark.slow
def test_change_made_by_one_process_is_told_by_another_of_the_same_hub(postgres: LivePostgres, tmp_path: Path) -> None:
    url = postgres.create_database("events-of-two")
    with live_hub(tmp_path / "one", database_url=url) as one, live_hub(tmp_path / "two", database_url=url) as two:
        later = threading.Timer(0.5, lambda: two.api().create_repo("team/name"))
        later.start()
        told = _follow(one, until=2)
        later.join()
    assert isinstance(told[0], Ready)
    assert isinstance(told[1], HubEvent)
    assert (told[1].kind, told[1].repo_id) == ("repo.created", "team/name")
