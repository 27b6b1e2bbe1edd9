"""Minutes of mixed load on one server: memory and files stay flat. Long form only."""

import asyncio
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from drill_server import drill_server
from drills import LONG, encoded, open_request, print_figures, stream

pytestmark = pytest.mark.drill


@pytest.mark.skipif(not LONG, reason="a soak is nothing in seconds")
async def test_soak_keeps_memory_and_files_flat(tmp_path: Path) -> None:
    seconds = float(os.environ.get("LORACTL_SOAK_S", "150"))
    with drill_server(tmp_path / "log", step_s=0.002) as server:
        chance = random.Random(28)
        codes: Counter[int] = Counter()

        async def visit() -> None:
            change: dict[str, Any] = chance.choice(
                [{}, {"n": 2}, {"logprobs": 3}, {"model": "nobody/nothing"}, {"max_tokens": 10**9}]
            )
            body = encoded(**({"max_tokens": chance.randint(1, 100), "stream": True} | change))
            if chance.random() < 0.1:
                _, writer = await open_request(server.port, body)
                await asyncio.sleep(0.02)
                writer.transport.abort()
                return
            codes[(await stream(server.port, body)).status] += 1

        async def worker(ends: float) -> None:
            while time.monotonic() < ends:
                await visit()

        async def load(seconds: float) -> None:
            await asyncio.gather(*(worker(time.monotonic() + seconds) for _ in range(16)))

        await load(seconds / 3)
        rss_mib, num_files, started = server.rss_mib, server.num_files, time.monotonic()
        await load(seconds * 2 / 3)
        hours = (time.monotonic() - started) / 3600
        await asyncio.sleep(1)
        assert set(codes) <= {200, 400, 404}
        assert server.num_files <= num_files
        slope = (server.rss_mib - rss_mib) / hours
        print_figures("28", seconds=seconds, codes=dict(codes), rss_mib=f"{rss_mib:.1f} to {server.rss_mib:.1f}",
                      mib_an_hour=round(slope, 1), files=f"{num_files} to {server.num_files}")  # fmt: skip
