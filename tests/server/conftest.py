"""One server with a fake engine, live on a port of its own, for every test of its outside."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from fakes import FakeEngine
from loractl.adapters.reference import Digest
from loractl.server.access import Access
from loractl.server.bridge import Bridge, BridgeLimits
from loractl.server.fetch.from_hub import FromHub
from loractl.server.fetch.hub_calls import FetchLimits, HubSide
from loractl.server.fetch.source import AdapterSource, Found
from loractl.server.metrics import ServerMetrics
from loractl.server.prompts import Prompts
from loractl.server.run import DrainingServer, open_socket, uvicorn_config
from loractl.server.serving import Serving, ServingSettings
from loractl.server.tracing import Tracing
from tiny_tokenizer import tiny_tokenizer

FINGERPRINT = "sha256:" + "b" * 64
DIGESTS = {name: Digest("sha256:" + letter * 64) for name, letter in (("cats", "c"), ("dogs", "d"))}


@dataclass
class Live:
    """A running server and the ways to talk to it."""

    url: str
    serving: Serving
    engine: FakeEngine
    engines: list[FakeEngine]
    http: httpx.AsyncClient
    openai: AsyncOpenAI
    uvicorn: DrainingServer
    task: "asyncio.Task[None]"


StartServer = Callable[..., Awaitable[Live]]


@pytest.fixture
async def start_server(tmp_path: Path) -> AsyncIterator[StartServer]:
    """Start servers; options: `hub`, `access`, `limits`, `tracing`, `prepare(engine)`, ServingSettings' fields."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**options: Any) -> Live:
            return await stack.enter_async_context(_live(tmp_path, **options))

        yield start


@pytest.fixture
async def live(start_server: StartServer) -> Live:
    return await start_server()


@contextlib.asynccontextmanager
async def _live(
    folder: Path,
    *,
    hub: HubSide | None = None,
    access: Access | None = None,
    limits: BridgeLimits | None = None,
    tracing: Tracing | None = None,
    prepare: Callable[[FakeEngine], None] = lambda engine: None,
    fetch_limits: FetchLimits | None = None,
    **settings: Any,
) -> AsyncIterator[Live]:
    tokenizer = tiny_tokenizer()
    engines: list[FakeEngine] = []

    def make_engine() -> FakeEngine:
        engine = FakeEngine(tokenizer)
        prepare(engine)
        engines.append(engine)
        return engine

    metrics = ServerMetrics()
    serving = Serving(
        settings=ServingSettings(base_name="tiny", base_fingerprint=FINGERPRINT, **settings),
        bridge=Bridge(make_engine, limits=limits, on_step=metrics.saw_step, on_load=metrics.saw_load),
        source=AdapterSource(
            local=_local(folder),
            hub=None if hub is None else FromHub(hub, limits=fetch_limits, on_call=metrics.saw_hub_call),
            base_fingerprint=FINGERPRINT,
        ),
        prompts=Prompts(tokenizer),
        metrics=metrics,
        access=access,
        tracing=tracing,
    )
    listener = open_socket("127.0.0.1", 0)
    ready = asyncio.Event()
    server = DrainingServer(uvicorn_config(serving), serving, ready.set)
    task = asyncio.create_task(_serve(server, listener))
    await asyncio.wait_for(ready.wait(), 20)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with httpx.AsyncClient(base_url=url, timeout=20) as http:
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=20)
        async with client:
            yield Live(url, serving, engines[0], engines, http, client, server, task)
    for engine in engines:
        if engine.hang is not None:
            engine.hang.set()
    server.should_exit = True
    await asyncio.wait_for(task, 20)


async def _serve(server: DrainingServer, listener: socket.socket) -> None:
    await server.serve(sockets=[listener])


def _local(folder: Path) -> Mapping[str, Found]:
    return {name: Found(name=name, digest=digest, folder=folder) for name, digest in DIGESTS.items()}
