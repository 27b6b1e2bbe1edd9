"""Faults on purpose against one server: short in CI, long by LORACTL_DRILLS=long; each prints its figures.

The engine is a fake that echoes prompts, so what is measured is the HTTP side: connections, queues, books.
"""

import asyncio
import os
import random
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from loractl.adapters.errors import RepoNotFound
from loractl.adapters.reference import AdapterRef, Digest
from loractl.hub.client import ResolvedAdapter

pytestmark = pytest.mark.drill

LONG = os.environ.get("LORACTL_DRILLS") == "long"
BODY = {"model": "tiny", "prompt": "a quick brown fox", "max_tokens": 400, "ignore_eos": True}


def _print(drill: str, **figures: object) -> None:
    print(f"drill {drill}: " + ", ".join(f"{name}={value}" for name, value in figures.items()))


async def _until(condition: Any, timeout_s: float = 20.0) -> float:
    started = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)
    return time.monotonic() - started


def _slow(engine: Any) -> None:
    engine.step_s = 0.01


async def _open(port: int, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = [
        "POST /v1/completions HTTP/1.1",
        "host: x",
        "content-type: application/json",
        f"content-length: {len(body)}",
    ]
    writer.write("\r\n".join([*head, "", ""]).encode() + body)
    await writer.drain()
    return reader, writer


def _body(**changes: Any) -> bytes:
    import msgspec

    return msgspec.json.encode(BODY | changes)


async def test_storm_of_disconnects_frees_everything(start_server: Any) -> None:
    live = await start_server(prepare=_slow)
    port = int(live.url.rpartition(":")[2])
    num_clients, rounds = (500, 5) if LONG else (60, 2)
    steps: list[int] = []
    chance = random.Random(4)
    for _ in range(rounds):

        async def leave(stream: bool) -> None:
            reader, writer = await _open(port, _body(stream=stream))
            if stream:
                await reader.readuntil(b"data: ")
                await asyncio.sleep(chance.random() * 0.2)
            else:
                await asyncio.sleep(0.05 + chance.random() * 0.2)
            writer.transport.abort()

        await asyncio.gather(*(leave(number % 3 > 0) for number in range(num_clients)))
        seconds = await _until(lambda: live.serving.bridge.num_open == 0 and live.serving.num_requests == 0)
        steps.append(round(seconds / 0.01))
    assert live.serving.quotas._running == {}
    assert not live.engine._rows
    _print("4", clients=num_clients, rounds=rounds, steps_until_empty=steps)
    answer = await live.http.post("/v1/completions", json=BODY | {"max_tokens": 2})
    assert answer.status_code == 200


class CountingHub:
    """A hub of one adapter whose digest can be moved; counts what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.letter = "1"
        self.num_resolves = self.num_fetches = 0

    def resolve(self, ref: AdapterRef) -> ResolvedAdapter:
        self.num_resolves += 1
        if ref.repo_id != "team/a":
            raise RepoNotFound(f"no {ref}")
        return ResolvedAdapter(
            repo_id=ref.repo_id,
            revision=ref.revision,
            commit="c" * 40,
            digest=Digest("sha256:" + self.letter * 64),
            version=None,
            base_id=None,
            base_fingerprint=None,
            rank=4,
            size_bytes=1,
        )

    def recall(self, ref: AdapterRef) -> ResolvedAdapter | None:
        del ref
        return None

    def cached(self, resolved: ResolvedAdapter) -> Path | None:
        del resolved
        return None

    def fetch(self, resolved: ResolvedAdapter) -> Path:
        del resolved
        self.num_fetches += 1
        time.sleep(0.3)
        return self.folder


async def test_herd_for_one_cold_adapter_downloads_it_once(start_server: Any, tmp_path: Path) -> None:
    hub = CountingHub(tmp_path)
    live = await start_server(hub=hub)
    num_clients = 500 if LONG else 100
    body = BODY | {"model": "team/a", "max_tokens": 2}
    asked = [live.http.post("/v1/completions", json=body) for _ in range(num_clients)]
    codes = [answer.status_code for answer in await asyncio.gather(*asked)]
    assert codes == [200] * num_clients
    assert hub.num_fetches == 1
    _print("27", clients=num_clients, downloads=hub.num_fetches, resolves=hub.num_resolves)


async def test_moved_channel_counts_for_new_requests_and_not_for_those_in_flight(
    start_server: Any, tmp_path: Path
) -> None:
    hub = CountingHub(tmp_path)
    live = await start_server(hub=hub, prepare=_slow)
    ask = {"model": "team/a@prod", "max_tokens": 300}
    running = asyncio.create_task(live.http.post("/v1/completions", json=BODY | ask))
    await _until(lambda: live.engine.submitted)
    hub.letter, started = "2", time.monotonic()
    digest = ""
    async with asyncio.timeout(10):
        while not digest.startswith("sha256:2"):
            answer = await live.http.post("/v1/completions", json=BODY | ask | {"max_tokens": 1})
            digest = answer.headers["x-loractl-adapter"]
    seconds = time.monotonic() - started
    before = await running
    assert before.headers["x-loractl-adapter"].startswith("sha256:1")
    assert before.json()["usage"]["completion_tokens"] == 300
    _print("21", seconds_until_the_new_version_answers=round(seconds, 2))


async def test_flood_of_unknown_names_leaves_metrics_and_memory_bounded(start_server: Any, tmp_path: Path) -> None:
    hub = CountingHub(tmp_path)
    live = await start_server(hub=hub)
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
    _print("29", names=num_names, codes=codes, lookups=hub.num_resolves, new_metric_lines=after - before)


async def test_many_streams_at_once_all_finish(start_server: Any) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_streams = 10_000 if LONG else 500
    # Both ends of every connection are in this process.
    if hard < 2 * num_streams + 200:
        num_streams = (hard - 200) // 2
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * num_streams + 200)), hard))
    live = await start_server(prepare=lambda engine: setattr(engine, "max_queue", 20_000))
    port = int(live.url.rpartition(":")[2])
    body, started = _body(stream=True, max_tokens=4), time.monotonic()

    async def finish() -> float:
        reader, writer = await _open(port, body)
        await reader.readuntil(b"data: ")
        first = time.monotonic() - started
        await reader.readuntil(b"data: [DONE]")
        writer.close()
        return first

    firsts = sorted(await asyncio.gather(*(finish() for _ in range(num_streams))))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(firsts) == num_streams
    seconds = time.monotonic() - started
    await _until(lambda: live.serving.num_requests == 0)
    p50, p99 = firsts[num_streams // 2], firsts[num_streams * 99 // 100]
    rss_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    _print("10", streams=num_streams, seconds=round(seconds, 1), p50_s=round(p50, 2), p99_s=round(p99, 2), rss=rss_mib)


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
    _print("24", field=next(iter(change)), ms=round(seconds * 1e3), lag_ms=round(lag_s * 1e3))
