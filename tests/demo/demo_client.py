"""What the demo asks the server, all through the official `openai` client. Knows no process and no training."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import httpx
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from demo_assets import Scored
from demo_data import label_of

_CONCURRENCY = 64
_DIGEST_HEADER = "x-loractl-adapter"


@dataclass(frozen=True, slots=True)
class Answer:
    """One request of the burst: which model it named, what came back, and the digest that answered."""

    model: str
    prompt: str
    text: str
    digest: str


def review_prompt(text: str) -> str:
    return f"Review: {text} Label:"


async def label_token_ids(client: AsyncOpenAI, base: str) -> list[int]:
    """Ask the server how the label words are spelled in tokens; the first token of each decides."""
    http = httpx.AsyncClient(base_url=str(client.base_url).removesuffix("/v1/"))
    async with http:
        ids: list[int] = []
        for label in ("positive", "negative"):
            reply = await http.post(
                "/tokenize", json={"model": base, "prompt": f" {label}", "add_special_tokens": False}
            )
            reply.raise_for_status()
            ids.append(int(reply.json()["tokens"][0]))
    return ids


async def label_accuracy(client: AsyncOpenAI, model: str, rows: Sequence[Scored], labels: Sequence[int]) -> float:
    """Share of rows whose likelier label word is the human one; all rows are in flight together."""

    async def ask(row: Scored) -> bool:
        reply = await client.completions.create(
            model=model,
            prompt=review_prompt(row.text),
            max_tokens=1,
            temperature=0.0,
            logit_bias={str(token): 100 for token in labels},
        )
        said = reply.choices[0].text.strip()
        return bool(said) and label_of(row).startswith(said)

    return await _share(ask, rows)


async def verdict_accuracy(client: AsyncOpenAI, model: str, rows: Sequence[Scored]) -> float:
    """Share of rows answered by one line of JSON with the right sentiment."""

    async def ask(row: Scored) -> bool:
        text = await _chat(client, model, row.text)
        try:
            verdict = json.loads(text)
        except ValueError:
            return False
        return isinstance(verdict, dict) and verdict.get("sentiment") == label_of(row)

    return await _share(ask, rows)


async def _share(ask: Callable[[Scored], Awaitable[bool]], rows: Sequence[Scored]) -> float:
    gate = asyncio.Semaphore(_CONCURRENCY)

    async def gated(row: Scored) -> bool:
        async with gate:
            return await ask(row)

    return sum(await asyncio.gather(*(gated(row) for row in rows))) / len(rows)


async def _chat(client: AsyncOpenAI, model: str, text: str) -> str:
    reply = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], max_completion_tokens=32, temperature=0.0
    )
    return (reply.choices[0].message.content or "").strip()


async def burst(client: AsyncOpenAI, models: Sequence[str], prompts: Sequence[str]) -> list[Answer]:
    """Send every prompt to every model at once; the answers come out of mixed batches."""

    async def ask(model: str, prompt: str) -> Answer:
        raw = await client.chat.completions.with_raw_response.create(
            model=model, messages=[{"role": "user", "content": prompt}], max_completion_tokens=24, temperature=0.0
        )
        text = raw.parse().choices[0].message.content or ""
        return Answer(model, prompt, text.strip(), raw.headers.get(_DIGEST_HEADER, ""))

    return list(await asyncio.gather(*(ask(model, prompt) for prompt in prompts for model in models)))


@dataclass(slots=True)
class Stream:
    """One streamed answer: the digest it runs on, and how many pieces have come."""

    digest: str = ""
    num_pieces: int = 0
    finish_reason: str | None = None


async def long_stream(client: AsyncOpenAI, model: str, *, num_tokens: int, started: asyncio.Event) -> Stream:
    """Stream a long answer; sets `started` when its first piece is here, so that the caller can act in between."""
    raw = await client.completions.with_raw_response.create(
        model=model,
        prompt=review_prompt("a film that takes its time"),
        max_tokens=num_tokens,
        temperature=0.0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    stream = Stream(digest=raw.headers.get(_DIGEST_HEADER, ""))
    async for piece in raw.parse():
        stream.num_pieces += 1
        started.set()
        if piece.choices and piece.choices[0].finish_reason:
            stream.finish_reason = piece.choices[0].finish_reason
    return stream


async def digest_of(client: AsyncOpenAI, model: str) -> str:
    """Ask one token and return the digest of the adapter that gave it."""
    raw = await client.completions.with_raw_response.create(model=model, prompt="Review: good Label:", max_tokens=1)
    return str(raw.headers.get(_DIGEST_HEADER, ""))


def metric(server_url: str, name: str, **labels: str) -> float:
    """Read one sample of the server's metrics page."""
    page = httpx.get(f"{server_url}/metrics", timeout=10.0).raise_for_status().text
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return float(sample.value)
    raise KeyError(name)
