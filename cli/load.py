"""Load on any OpenAI-compatible server and what its clients saw. Knows HTTP and clocks; no engine, no click."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import pairwise
from typing import Any

import msgspec

from loractl.cli.event_streams import EventStreams

# Every tokenizer has this many tokens, and none of these ends a sequence by being sent in a prompt.
_PROMPT_TOKEN_IDS = range(16, 256)
_TIMEOUT_S = 600.0


class _Choice(msgspec.Struct):
    text: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is sent: how many requests, of what size, to which models, and how they arrive.

    `rate_per_s` makes an open loop with Poisson arrivals; without it `concurrency` clients ask one after the other.
    `popularity` is `uniform` or the exponent of Zipf's law, the first model the most popular.
    """

    models: Sequence[str]
    num_requests: int = 64
    concurrency: int = 8
    rate_per_s: float | None = None
    prompt_tokens: int = 64
    output_tokens: int = 64
    zipf: float | None = None
    ignore_eos: bool = True
    in_turn: bool = False
    """One model after the other instead of by chance, so that each of N requests in flight has its own."""
    seed: int = 0


@dataclass(slots=True, kw_only=True)
class Seen:
    """One request as its client saw it; times are seconds of the monotonic clock."""

    model: str
    started_s: float
    chunks_s: list[float] = field(default_factory=list[float])
    ended_s: float = 0.0
    num_tokens: int = 0
    failure: str | None = None

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first; None where there was only one."""
        if self.num_tokens < 2 or len(self.chunks_s) < 2:
            return None
        return (self.chunks_s[-1] - self.chunks_s[0]) / (self.num_tokens - 1)


def pick_models(load: Load) -> list[str]:
    """The model of each request, in order of sending."""
    if load.in_turn:
        return [load.models[number % len(load.models)] for number in range(load.num_requests)]
    chance = random.Random(load.seed)  # noqa: S311 - traffic to measure with, no secret
    weights = [1.0 if load.zipf is None else 1.0 / (place + 1) ** load.zipf for place in range(len(load.models))]
    return chance.choices(list(load.models), weights, k=load.num_requests)


async def run_load(url: str, key: str | None, load: Load) -> tuple[list[Seen], float]:
    """Send everything; return what was seen of each request, and the seconds from the first to the last."""
    chance = random.Random(load.seed + 1)  # noqa: S311 - as above
    streams = EventStreams(url, key=key)

    async def send(model: str) -> Seen:
        prompt = [chance.choice(_PROMPT_TOKEN_IDS) for _ in range(load.prompt_tokens)]
        return await _ask(streams, model, prompt, load)

    started = time.perf_counter()
    arrive = _closed_loop if load.rate_per_s is None else _open_loop
    seen = await arrive(pick_models(load), send, load)
    streams.close()
    return seen, time.perf_counter() - started


async def _closed_loop(models: list[str], send: Callable[[str], Awaitable[Seen]], load: Load) -> list[Seen]:
    left, seen = iter(models), list[Seen]()

    async def client() -> None:
        for model in left:
            seen.append(await send(model))

    await asyncio.gather(*(client() for _ in range(min(load.concurrency, len(models)))))
    return seen


async def _open_loop(models: list[str], send: Callable[[str], Awaitable[Seen]], load: Load) -> list[Seen]:
    chance, tasks = random.Random(load.seed + 2), list[asyncio.Task[Seen]]()  # noqa: S311 - as above
    at = time.perf_counter()
    for model in models:
        # Against the clock, so that a busy client does not lower the rate.
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        tasks.append(asyncio.ensure_future(send(model)))
        at += chance.expovariate(load.rate_per_s or 1.0)
    return await asyncio.gather(*tasks)


async def _ask(streams: EventStreams, model: str, prompt: list[int], load: Load) -> Seen:
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": load.output_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if load.ignore_eos:
        body["ignore_eos"] = True
    seen = Seen(model=model, started_s=time.perf_counter())
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            status = await streams.post("/v1/completions", msgspec.json.encode(body), lambda data: _note(data, seen))
        if status != HTTPStatus.OK:
            seen.failure = str(status)
    except (OSError, TimeoutError, ValueError) as error:
        seen.failure = type(error).__name__
    seen.ended_s = time.perf_counter()
    if seen.failure is None and not seen.chunks_s:
        seen.failure = "no token came"
    return seen


def _note(data: bytes, seen: Seen) -> None:
    if data == b"[DONE]":
        return
    now, event = time.perf_counter(), _decode(data)
    if event.error is not None:
        facts = event.error if isinstance(event.error, dict) else {}
        seen.failure = str(facts.get("code") or facts.get("type") or "error")
        return
    # The last chunk may say only why the answer ended.
    if any(choice.text for choice in event.choices):
        seen.chunks_s.append(now)
    if event.usage is not None:
        seen.num_tokens = event.usage.completion_tokens


def summarize(seen: Sequence[Seen], seconds: float) -> dict[str, Any]:
    """Figures over the requests that were answered; times in milliseconds."""
    good = [each for each in seen if each.failure is None]
    num_tokens = sum(each.num_tokens for each in good)
    gaps = [later - earlier for each in good for earlier, later in pairwise(each.chunks_s)]
    return {
        "requests": len(seen),
        "failures": dict(Counter(each.failure for each in seen if each.failure is not None)),
        "seconds": round(seconds, 3),
        "requests_per_s": round(len(good) / seconds, 3),
        "output_tokens": num_tokens,
        "output_tokens_per_s": round(num_tokens / seconds, 1),
        "ttft_ms": _spread([each.chunks_s[0] - each.started_s for each in good]),
        "itl_ms": _spread(gaps),
        "tpot_ms": _spread([each.tpot_s for each in good if each.tpot_s is not None]),
        "e2e_ms": _spread([each.ended_s - each.started_s for each in good]),
        "by_model": dict(Counter(each.model for each in seen).most_common()),
    }


def _spread(values_s: Sequence[float]) -> dict[str, float] | None:
    if not values_s:
        return None
    ordered = sorted(values_s)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3, 3)

    return {"mean": round(sum(ordered) / len(ordered) * 1e3, 3), "p50": at(0.5), "p95": at(0.95), "p99": at(0.99)}
