"""The real engine behind the real API, in this process, on a port of its own."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loractl.server import assemble
from loractl.server.engine.settings import EngineSettings
from loractl.server.run import DrainingServer, open_socket, uvicorn_config
from loractl.server.serving import Serving


@dataclass
class RealServer:
    url: str
    serving: Serving
    uvicorn: DrainingServer
    task: "asyncio.Task[None]"


@contextlib.asynccontextmanager
async def real_server(base: Path, *, engine: EngineSettings | None = None, **choices: Any) -> AsyncIterator[RealServer]:
    """Load `base` unquantized in float32 and serve it; `choices` are the fields of `assemble.Choices`."""
    engine = engine or EngineSettings(num_slots=2, max_rank=8, kv_bytes=8 << 20)
    chosen = assemble.Choices(base=str(base), quantization="none", dtype="float32", engine=engine, **choices)
    serving = await asyncio.to_thread(assemble.load, await asyncio.to_thread(assemble.check, chosen))
    listener, ready = open_socket("127.0.0.1", 0), asyncio.Event()
    server = DrainingServer(uvicorn_config(serving), serving, ready.set)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    await asyncio.wait_for(ready.wait(), 60)
    yield RealServer(f"http://127.0.0.1:{listener.getsockname()[1]}", serving, server, task)
    server.should_exit = True
    await asyncio.wait_for(task, 30)
