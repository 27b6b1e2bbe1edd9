"""What a router makes of /metrics/routing: llm-d's lora-affinity scorer, in Python, before three servers of 8 slots."""

import asyncio
import contextlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drills import BODY, LONG, print_figures
from fake_hub import FakeHub, resolved
from loractl.adapters.reference import AdapterRef, Digest
from loractl.hub.client_records import ResolvedAdapter
from loractl.server.fetch.hub_calls import FetchLimits

NUM_ADAPTERS = 200
_INFO = re.compile(
    r'lora_requests_info\{max_lora="(\d+)",running_lora_adapters="(.*?)",waiting_lora_adapters="(.*?)"\}'
)


class EveryName(FakeHub):
    """A hub that has every adapter, on the disk already."""

    def resolve(self, ref: AdapterRef) -> ResolvedAdapter:
        return resolved(ref, Digest(f"sha256:{int(ref.name.removeprefix('a')):064x}"))

    def cached(self, resolved: ResolvedAdapter) -> Path:
        del resolved
        return self.folder


@dataclass(frozen=True, slots=True)
class Seen:
    """One replica as the picker saw it last."""

    max_lora: int = 0
    running: frozenset[str] = frozenset()
    waiting: frozenset[str] = frozenset()

    def score(self, model: str) -> float:
        """llm-d-router's lora-affinity-scorer."""
        if model in self.running:
            return 1.0
        if len(self.running) + len(self.waiting) < self.max_lora:
            return 0.8
        return 0.6 if model in self.waiting else 0.0


def _read(page: str) -> Seen:
    found = _INFO.search(page)
    assert found is not None
    running, waiting = (frozenset(name for name in found[group].split(",") if name) for group in (2, 3))
    return Seen(int(found[1]), running, waiting)


async def _route(lives: list[Any], *, by_affinity: bool, num_requests: int) -> tuple[float, float]:
    """Shares of requests: sent where the adapter was, of those that it was anywhere for; and found resident, of all."""
    chance = random.Random(7)
    weights = [1 / rank**1.1 for rank in range(1, NUM_ADAPTERS + 1)]
    models = [f"team/a{number}" for number in chance.choices(range(NUM_ADAPTERS), weights, k=num_requests)]
    seen = [Seen() for _ in lives]

    async def poll(place: int) -> None:
        while True:
            seen[place] = _read((await lives[place].http.get("/metrics/routing")).text)
            await asyncio.sleep(0.05)

    polls = [asyncio.create_task(poll(place)) for place in range(len(lives))]
    num_possible = num_kept = num_resident = 0
    left = iter(models)

    async def client() -> None:
        nonlocal num_possible, num_kept, num_resident
        for model in left:
            holders = [place for place, live in enumerate(lives) if _holds(live, model)]
            scores = [one.score(model) if by_affinity else 0.0 for one in seen]
            place = chance.choice([at for at, score in enumerate(scores) if score == max(scores)])
            num_possible += bool(holders)
            num_kept += place in holders
            num_resident += place in holders
            answer = await lives[place].http.post("/v1/completions", json=BODY | {"model": model, "max_tokens": 4})
            assert answer.status_code == 200, answer.text

    await asyncio.gather(*(client() for _ in range(4)))
    for task in polls:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    return num_kept / num_possible, num_resident / num_requests


def _holds(live: Any, model: str) -> bool:
    return Digest(f"sha256:{int(model.removeprefix('team/a')):064x}") in live.engine.resident


async def test_router_that_follows_the_page_sends_requests_where_their_adapter_is(
    start_server: Callable[..., Any], tmp_path: Path
) -> None:
    num_requests = 2000 if LONG else 300
    figures: dict[str, tuple[float, float]] = {}
    limits = FetchLimits(max_lookups_per_s=10_000.0, fresh_s=3600.0, usable_s=3600.0, resolve_timeout_s=60.0)
    for name, by_affinity in (("affinity", True), ("random", False)):
        options = {"hub": EveryName(tmp_path), "fetch_limits": limits}
        lives = [
            await start_server(**options, prepare=lambda engine: setattr(engine, "step_s", 0.005)) for _ in range(3)
        ]
        figures[name] = await _route(lives, by_affinity=by_affinity, num_requests=num_requests)
    assert figures["affinity"][0] >= 0.9
    assert figures["affinity"][1] > figures["random"][1]
    print_figures(
        "routing",
        requests=num_requests,
        sent_where_the_adapter_was=round(figures["affinity"][0], 3),
        found_resident=round(figures["affinity"][1], 3),
        at_random=f"{figures['random'][0]:.3f} and {figures['random'][1]:.3f}",
    )
