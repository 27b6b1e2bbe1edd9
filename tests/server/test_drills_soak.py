"""Minutes of mixed load on one server: memory and files stay flat. Long form only."""

import asyncio
import os
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from drill_server import DrillServer, drill_server
from drills import LONG, encoded, open_request, print_figures, stream
from tiny_models import make_adapter, make_tiny_base

pytestmark = pytest.mark.drill

_KINDS: list[dict[str, Any]] = [{}, {"n": 2}, {"logprobs": 3}, {"model": "nobody/nothing"}, {"max_tokens": 10**9}]


def _options(engine: str, root: Path) -> dict[str, Any]:
    if engine == "fake":
        return {"step_s": 0.002}
    base = make_tiny_base(root / "tiny")
    # More than fit, so that slots change hands all the time.
    adapters = {f"a{seed}": str(make_adapter(base, root / f"a{seed}", seed=seed)) for seed in range(6)}
    return {"base": str(base), "adapters": adapters, "num_slots": 3}


async def _visit(server: DrillServer, kinds: list[dict[str, Any]], chance: random.Random, codes: Counter[int]) -> None:
    body = encoded(**({"max_tokens": chance.randint(1, 100), "stream": True} | chance.choice(kinds)))
    if chance.random() < 0.1:
        _, writer = await open_request(server.port, body)
        await asyncio.sleep(0.02)
        writer.transport.abort()
        return
    codes[(await stream(server.port, body)).status] += 1


@pytest.mark.skipif(not LONG, reason="a soak is nothing in seconds")
@pytest.mark.parametrize("engine", ["fake", "real"])
async def test_soak_keeps_memory_and_files_flat(engine: str, tmp_path: Path) -> None:
    seconds = float(os.environ.get("LORACTL_SOAK_S", "150"))
    options = _options(engine, tmp_path)
    kinds = _KINDS + [{"model": name} for name in options.get("adapters", ())]
    with drill_server(tmp_path / "log", **options) as server:
        chance, codes = random.Random(28), Counter[int]()
        seen: list[tuple[float, float]] = []

        async def worker(ends: float) -> None:
            while time.monotonic() < ends:
                await _visit(server, kinds, chance, codes)

        async def look(ends: float) -> None:
            while time.monotonic() < ends:
                seen.append((time.monotonic() / 3600, server.rss_mib))
                await asyncio.sleep(0.5)

        async def load(seconds: float) -> None:
            ends = time.monotonic() + seconds
            await asyncio.gather(look(ends), *(worker(ends) for _ in range(16)))

        await load(seconds / 3)
        num_files = server.num_files
        seen.clear()
        await load(seconds * 2 / 3)
        await asyncio.sleep(1)
        assert set(codes) <= {200, 400, 404}
        assert server.num_files <= num_files
        slopes = [
            statistics.linear_regression(*zip(*part, strict=True)).slope for part in (seen, seen[len(seen) // 2 :])
        ]
        print_figures(
            "28",
            engine=engine,
            seconds=seconds,
            codes=dict(codes),
            rss_mib_after_warmup=f"{seen[0][1]:.1f} to {seen[-1][1]:.1f}",
            mib_an_hour=round(slopes[0], 1),
            in_its_second_half=round(slopes[1], 1),
            files=f"{num_files} to {server.num_files}",
        )
