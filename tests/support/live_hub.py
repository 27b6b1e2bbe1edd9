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
import obstore
import uvicorn
from huggingface_hub import HfApi
from obstore.store import S3Store

from loractl.hub.actor import SYSTEM
from loractl.hub.app import create_app
from loractl.hub.services import open_hub, open_store
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

    def environment(self) -> dict[str, str]:
        """What an operator's command beside this hub needs to find it."""
        places = {"ROOT": str(self.settings.root), "DATABASE_URL": self.settings.database_url}
        places["BLOBS"] = self.settings.blobs
        return {f"LORACTL_HUB_{name}": value for name, value in places.items() if value is not None}

    def blob_bytes(self, sha256: str) -> bytes:
        """A blob as it lies in the store, unchecked."""
        return asyncio.run(_read_blob(self.settings, sha256))

    def spoil_blob(self, sha256: str, data: bytes) -> None:
        """Put other bytes under a blob's name, as a failing disk would."""
        if self.settings.blobs is None:
            path = self.settings.root / "blobs" / "sha256" / sha256[:2] / sha256[2:4] / sha256
            path.chmod(0o644)
            path.write_bytes(data)
            return
        bucket, _, prefix = self.settings.blobs.removeprefix("s3://").partition("/")
        store = S3Store(bucket, prefix=prefix, client_options={"allow_http": True})
        obstore.put(store, f"blobs/sha256/{sha256[:2]}/{sha256[2:4]}/{sha256}", data)

    def lose_blob(self, sha256: str) -> None:
        """Remove a blob behind the hub's back."""
        asyncio.run(_delete_blob(self.settings, sha256))

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


async def _read_blob(settings: HubSettings, sha256: str) -> bytes:
    store = await open_store(settings)
    return b"".join([piece async for piece in store.read(sha256)])


async def _delete_blob(settings: HubSettings, sha256: str) -> None:
    await (await open_store(settings)).delete(sha256)


@contextlib.contextmanager
def live_hub(root: Path, *, listen_port: int = 0, **settings: Any) -> Iterator[LiveHub]:
    """Run a hub until the block ends."""
    chosen = HubSettings(root=root, port=0, **settings)
    admin = asyncio.run(_create(chosen, TokenCreate(name="admin", roles=["admin"])))
    app = create_app(chosen)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on"))
    listener = socket.create_server(("127.0.0.1", listen_port))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 30.0
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.started, "the hub did not start"
        yield LiveHub(f"http://127.0.0.1:{listener.getsockname()[1]}", chosen, admin)
    finally:
        if server.started:
            app.state.hub.feed.stop()
        server.should_exit = True
        thread.join(30.0)
        listener.close()
