"""The real engine behind the real API: base and adapters in one burst, each answer as PEFT alone would give it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import AsyncOpenAI
from peft import PeftModel
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM

from loractl.adapters.digest import folder_digest
from loractl.server import assemble
from loractl.server.engine.settings import EngineSettings
from loractl.server.prompts import Prompts
from loractl.server.run import DrainingServer, open_socket, uvicorn_config
from tiny_models import make_adapter, make_tiny_base

pytestmark = pytest.mark.slow

PROMPT = "a film of great charm"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("real")
    base = make_tiny_base(root / "tiny")
    adapters = {f"a{seed}": make_adapter(base, root / f"a{seed}", seed=seed, r=2 * seed) for seed in (1, 2, 4)}
    return {"tiny": base, **adapters}


@pytest.fixture
async def client(folders: dict[str, Path]) -> AsyncIterator[AsyncOpenAI]:
    choices = assemble.Choices(
        base=str(folders["tiny"]),
        adapters={name: folder for name, folder in folders.items() if name != "tiny"},
        quantization="none",
        dtype="float32",
        engine=EngineSettings(num_slots=2, max_rank=8, kv_bytes=8 << 20),
    )
    serving = await asyncio.to_thread(assemble.load, assemble.check(choices))
    listener, ready = open_socket("127.0.0.1", 0), asyncio.Event()
    server = DrainingServer(uvicorn_config(serving), serving, ready.set)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    await asyncio.wait_for(ready.wait(), 60)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    async with AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, timeout=60) as client:
        yield client
    server.should_exit = True
    await task


def _alone(folders: dict[str, Path], name: str, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens of transformers and PEFT, one model at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(folders["tiny"], dtype=torch.float32)
    if name != "tiny":
        model = PeftModel.from_pretrained(model, folders[name])
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


async def test_burst_over_all_adapters_equals_each_alone(client: AsyncOpenAI, folders: dict[str, Path]) -> None:
    prompt, num_tokens = [40, 41, 42, 43, 44, 45, 46], 12

    async def ask(name: str) -> tuple[str, list[str], str]:
        raw = await client.completions.with_raw_response.create(
            model=name, prompt=prompt, max_tokens=num_tokens, temperature=0, logprobs=0, extra_body={"ignore_eos": True}
        )
        reply = raw.parse()
        assert reply.choices[0].logprobs is not None
        assert reply.choices[0].finish_reason == "length"
        return name, reply.choices[0].logprobs.tokens or [], raw.headers["x-loractl-adapter"]

    answers = await asyncio.gather(*(ask(name) for name in [*folders] * 3))
    tokenizer = Prompts.from_folder(folders["tiny"])
    for name, tokens, digest in answers:
        expected = _alone(folders, name, prompt, num_tokens)
        assert tokens == [tokenizer.token_text(token_id) for token_id in expected], name
        assert digest == ("base" if name == "tiny" else folder_digest(folders[name]))


async def test_ways_into_slots_and_what_the_device_holds_are_told(
    client: AsyncOpenAI, folders: dict[str, Path]
) -> None:
    adapters = [name for name in folders if name != "tiny"]
    for name in [*adapters, *adapters]:  # three adapters in turn on two slots: the second round comes from the host
        await client.completions.create(model=name, prompt=[5, 6, 7], max_tokens=1)
    page = (await client.with_options().get("../metrics", cast_to=httpx.Response)).text
    samples = {
        (sample.name.removeprefix("loractl_server_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    assert samples["adapter_load_seconds_count", "read"] == 3
    assert samples["adapter_load_seconds_count", "copy"] == 6
    assert samples["adapter_evictions_total", "gpu"] == 4
    assert {level: samples["adapter_cache_requests_total", level, "hit"] for level in ("gpu", "host", "disk")} == {
        "gpu": 0,
        "host": 3,
        "disk": 3,
    }
    base = AutoModelForCausalLM.from_pretrained(folders["tiny"], dtype=torch.float32)
    assert samples["device_memory_bytes", "weights"] >= sum(p.nbytes for p in base.parameters())
    assert 0 < samples["device_memory_bytes", "kv"] <= 8 << 20
    smallest = (folders["a1"] / "adapter_model.safetensors").stat().st_size
    assert samples["device_memory_bytes", "adapters"] > 2 * smallest


async def test_chat_stream_ends_and_counts(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="a1",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=9,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
