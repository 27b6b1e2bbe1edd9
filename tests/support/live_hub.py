"""A hub of its own for a test: the real application on a free port, in a thread. Knows no test."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from huggingface_hub import HfApi

from loractl.hub.actor import SYSTEM
from loractl.hub.app import create_app
from loractl.hub.services import open_hub
from loractl.hub.settings import HubSettings
from loractl.hub.wire import TokenCreate, TokenRole


@dataclass(frozen=True, slots=True)
class LiveHub:
    """A running hub and the secret of its admin."""

    url: str
    settings: HubSettings
    admin: str

    def token(
        self, *roles: TokenRole, pattern: str = "*", name: str = "somebody", expires_in_days: int | None = None
    ) -> str:
        """Make a token and give its secret."""
        wanted = TokenCreate(name=name, roles=list(roles), pattern=pattern, expires_in_days=expires_in_days)
        return asyncio.run(_create(self.settings, wanted))

    def api(self, token: str | None = None) -> HfApi:
        """The stock client."""
        return HfApi(endpoint=self.url, token=self.admin if token is None else token)

    def http(self, token: str | None = None) -> httpx.Client:
        """A bare client; an empty token sends none."""
        secret = self.admin if token is None else token
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30.0)


async def _create(settings: HubSettings, wanted: TokenCreate) -> str:
    async with open_hub(settings) as hub:
        return (await hub.tokens.create(wanted, actor=SYSTEM)).secret


@contextlib.contextmanager
def live_hub(root: Path, **settings: Any) -> Iterator[LiveHub]:
    """Run a hub until the block ends."""
    chosen = HubSettings(root=root, port=0, **settings)
    admin = asyncio.run(_create(chosen, TokenCreate(name="admin", roles=["admin"])))
    server = uvicorn.Server(uvicorn.Config(create_app(chosen), log_config=None, access_log=False, lifespan="on"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 30.0
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.started, "the hub did not start"
        yield LiveHub(f"http://127.0.0.1:{listener.getsockname()[1]}", chosen, admin)
    finally:
        server.should_exit = True
        thread.join(30.0)
        listener.close()
