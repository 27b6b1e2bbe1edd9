"""Faults on purpose against one server: short in CI, long by LORACTL_DRILLS=long; each prints its figures.

The engine is a fake that echoes prompts, so what is measured is the HTTP side: connections, queues, books.
"""

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import pytest

from drills import BODY, LONG, encoded, open_request, print_figures, stream, until
from fake_hub import FakeHub
from loractl.hub.client_records import ResolvedAdapter
from loractl.server.fetch.hub_calls import FetchLimits

pytestmark = pytest.mark.drill


def _slow(engine: Any) -> None:
    engine.step_s = 0.01


async def test_storm_of_disconnects_frees_everything(start_server: Any) -> None:
    live = await start_server(prepare=_slow)
    port = int(live.url.rpartition(":")[2])
    num_clients, rounds = (500, 5) if LONG else (60, 2)
    steps: list[int] = []
    chance = random.Random(4)
    for _ in range(rounds):

        async def leave(stream: bool) -> None:
            reader, writer = await open_request(port, encoded(stream=stream))
            if stream:
                await reader.readuntil(b"data: ")
                await asyncio.sleep(chance.random() * 0.2)
            else:
                await asyncio.sleep(0.05 + chance.random() * 0.2)
            writer.transport.abort()

        await asyncio.gather(*(leave(number % 3 > 0) for number in range(num_clients)))
        before = live.engine.num_steps
        await until(lambda: live.serving.bridge.num_open == 0 and live.serving.num_requests == 0)
        steps.append(live.engine.num_steps - before)
    assert live.serving.quotas._running == {}
    assert not live.engine._rows
    print_figures("4", clients=num_clients, rounds=rounds, steps_until_empty=steps)
    answer = await live.http.post("/v1/completions", json=BODY | {"max_tokens": 2})
    assert answer.status_code == 200


class ColdHub(FakeHub):
    """A hub whose adapters are never on the disk, and slow to fetch."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fingerprint, self.fetch_s = None, 0.3

    def cached(self, resolved: ResolvedAdapter) -> None:
        del resolved


async def test_herd_for_one_cold_adapter_downloads_it_once(start_server: Any, tmp_path: Path) -> None:
    hub = ColdHub(tmp_path)
    live = await start_server(hub=hub)
    num_clients = 500 if LONG else 100
    body = encoded(model="team/a", max_tokens=2, stream=True)
    port = int(live.url.rpartition(":")[2])
    codes = [one.status for one in await asyncio.gather(*(stream(port, body) for _ in range(num_clients)))]
    assert codes == [200] * num_clients
    assert len(hub.fetches) == 1
    print_figures("27", clients=num_clients, downloads=len(hub.fetches), resolves=len(hub.resolves))


async def test_moved_channel_counts_for_new_requests_and_not_for_those_in_flight(
    start_server: Any, tmp_path: Path
) -> None:
    hub = ColdHub(tmp_path)
    live = await start_server(hub=hub, prepare=_slow)
    ask = {"model": "team/a@prod", "max_tokens": 300}
    running = asyncio.create_task(live.http.post("/v1/completions", json=BODY | ask))
    await until(lambda: live.engine.submitted)
    hub.digits["team/a"], started = "2", time.monotonic()
    digest = ""
    async with asyncio.timeout(10):
        while not digest.startswith("sha256:2"):
            answer = await live.http.post("/v1/completions", json=BODY | ask | {"max_tokens": 1})
            digest = answer.headers["x-loractl-adapter"]
    seconds = time.monotonic() - started
    before = await running
    assert before.headers["x-loractl-adapter"].startswith("sha256:1")
    assert before.json()["usage"]["completion_tokens"] == 300
    print_figures("21", seconds_until_the_new_version_answers=round(seconds, 2))


async def test_flood_of_unknown_names_leaves_metrics_and_memory_bounded(start_server: Any, tmp_path: Path) -> None:
    hub = ColdHub(tmp_path)
    # A busy machine must not look like a slow hub.
    live = await start_server(hub=hub, fetch_limits=FetchLimits(resolve_timeout_s=60.0))
    await live.http.post("/v1/completions", json=BODY | {"model": "nobody/zero", "max_tokens": 1})
    before = (await live.http.get("/metrics")).text.count("\n")
    num_names = 5000 if LONG else 300
    codes: dict[int, int] = {}
    for start in range(0, num_names, 50):
        names = [f"nobody/n{number}" for number in range(start, min(start + 50, num_names))]
        asked = [live.http.post("/v1/completions", json=BODY | {"model": name}) for name in names]
        for answer in await asyncio.gather(*asked):
            codes[answer.status_code] = codes.get(answer.status_code, 0) + 1
    assert set(codes) <= {404, 429}
    after = (await live.http.get("/metrics")).text.count("\n")
    # One more series may appear: the refusal of lookups beyond the limit, and its HTTP code.
    assert after - before <= 8
    print_figures("29", names=num_names, codes=codes, lookups=len(hub.resolves), new_metric_lines=after - before)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "x" * 3_000_000},
        {"prompt": ["x"] * 100_000},
        {"n": 10**9},
        {"logprobs": 10**6},
        {"stop": ["x" * 300]},
        {"stop": ["x"] * 10_000},
        {"logit_bias": {str(number): 1 for number in range(5000)}},
        {"max_tokens": 10**12},
        {"adapters": [{"name": "cats"}] * 1000},
        {"structured_outputs": {"regex": "(a+)+" * 2000}},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_hostile_size_is_refused_while_others_are_answered(live: Any, change: dict[str, Any]) -> None:
    lag_s = 0.0

    async def watch() -> None:
        nonlocal lag_s
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            lag_s = max(lag_s, time.monotonic() - before)

    watcher = asyncio.create_task(watch())
    started = time.monotonic()
    answer = await live.http.post("/v1/completions", json=BODY | change)
    seconds = time.monotonic() - started
    watcher.cancel()
    assert answer.status_code in {400, 413}
    assert not live.engine.submitted
    print_figures("24", field=next(iter(change)), ms=round(seconds * 1e3), lag_ms=round(lag_s * 1e3))
