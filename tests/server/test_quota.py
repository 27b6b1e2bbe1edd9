"""A key gets what it was promised and no more, and is told when to come back."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from loractl.adapters.errors import Overloaded
from loractl.server.access import Access, Key
from loractl.server.quota import Quotas

KEY = "some-key-0123456789"


def _access(folder: Path, limits: str) -> Access:
    (folder / "keys").write_text(f"{KEY} blue {limits}\n")
    return Access.from_file(folder / "keys")


async def _ask(live: Any, **change: Any) -> Any:
    body = {"model": "tiny", "prompt": [5, 6, 7, 8], "max_tokens": 6} | change
    return await live.http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {KEY}"})


async def test_request_above_the_rate_is_429_with_retry_after(start_server: Any, tmp_path: Path) -> None:
    live = await start_server(access=_access(tmp_path, "requests=2"))
    answers = [await _ask(live) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"


async def test_tokens_above_the_minute_are_429(start_server: Any, tmp_path: Path) -> None:
    live = await start_server(access=_access(tmp_path, "tokens=15"))
    assert [(await _ask(live)).status_code for _ in range(2)] == [200, 429]


async def test_streams_count_as_running_until_they_end(start_server: Any, tmp_path: Path) -> None:
    def slow(engine: Any) -> None:
        engine.step_s = 0.01

    live = await start_server(access=_access(tmp_path, "concurrent=1"), prepare=slow)
    first = asyncio.create_task(_ask(live, stream=True, max_tokens=100))
    while not live.engine.submitted:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert (await _ask(live)).status_code == 429
    assert (await first).text.endswith("[DONE]\n\n")
    assert (await _ask(live)).status_code == 200


def test_bucket_fills_again_in_time() -> None:
    now = [0.0]
    quotas, key = Quotas(clock=lambda: now[0]), Key(tenant="t", tokens_per_minute=60)
    quotas.take_tokens(key, 60)
    with pytest.raises(Overloaded) as caught:
        quotas.take_tokens(key, 30)
    assert caught.value.retry_after_s == pytest.approx(30)
    now[0] = 30.0
    quotas.take_tokens(key, 30)


def test_request_larger_than_a_minute_passes_on_a_full_bucket_and_is_paid_after() -> None:
    now = [0.0]
    quotas, key = Quotas(clock=lambda: now[0]), Key(tenant="t", tokens_per_minute=60)
    quotas.take_tokens(key, 120)
    now[0] = 60.0
    with pytest.raises(Overloaded):
        quotas.take_tokens(key, 1)
    now[0] = 62.0
    quotas.take_tokens(key, 1)
