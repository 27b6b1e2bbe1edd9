"""Runs the hub's process, and the work that an operator does beside it. Knows uvicorn and the services, no route."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from litestar import Litestar

from loractl.adapters.errors import UsageError
from loractl.hub.actor import SYSTEM
from loractl.hub.app import create_app
from loractl.hub.collect import Collected
from loractl.hub.fsck import Report, check
from loractl.hub.logs import configure_logs
from loractl.hub.registry.records import UpkeepKind
from loractl.hub.scheduled_gc import collect_and_note
from loractl.hub.services import open_hub
from loractl.hub.settings import HubSettings
from loractl.hub.wire import TokenCreate, TokenCreated, TokenView

Announce = Callable[[HubSettings, str, str | None], None]

_DRAIN_S = 30


def serve_hub(settings: HubSettings, *, announce: Announce) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight are finished first. Raises UsageError when it cannot listen."""
    configure_logs(settings.log_level)
    new_token = asyncio.run(first_token(settings))
    with _listener(settings) as listener:
        port = listener.getsockname()[1]
        host = "127.0.0.1" if settings.host in {"0.0.0.0", "::"} else settings.host  # noqa: S104
        shown = f"[{host}]" if ":" in host else host
        announce(settings, settings.public_url or f"http://{shown}:{port}", new_token)
        app = create_app(settings)
        config = uvicorn.Config(
            app,
            log_config=None,
            # The edge writes an access log of its own, with request ids and without query strings.
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_DRAIN_S,
            timeout_keep_alive=75,
            lifespan="on",
        )
        server = _Server(config, on_stop=lambda: _end_streams(app))
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    logging.getLogger("loractl.hub").info("stopped")


def _end_streams(app: Litestar) -> None:
    app.state.hub.feed.stop()


class _Server(uvicorn.Server):
    """uvicorn, except that a stop it was asked for ends with exit code 0: it would raise the signal again."""

    def __init__(self, config: uvicorn.Config, *, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        del sig, frame
        if self.started:
            # Streams would otherwise hold the stop until its deadline.
            self._on_stop()
        self.force_exit = self.should_exit
        self.should_exit = True


def _listener(settings: HubSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}", hint="choose another --port"
        ) from error


async def first_token(settings: HubSettings) -> str | None:
    """Make the admin token of a hub that has no token yet; its secret, or None when there are tokens.

    Raises UsageError for a hub that nobody could use and that others could reach.
    """
    async with open_hub(settings) as hub:
        if await hub.tokens.any_exist():
            if not settings.is_loopback and not await hub.tokens.any_valid():
                raise UsageError(
                    f"--host {settings.host}: every token of this hub is revoked or expired",
                    hint="make one with `loractl hub token create`, or listen on 127.0.0.1",
                )
            return None
        created = await hub.tokens.create(TokenCreate(name="admin", roles=["admin"]), actor=SYSTEM)
        return created.secret


async def create_token(settings: HubSettings, wanted: TokenCreate) -> TokenCreated:
    """Make a token beside a running hub or before its first start."""
    async with open_hub(settings) as hub:
        return await hub.tokens.create(wanted, actor=SYSTEM)


async def list_tokens(settings: HubSettings) -> list[TokenView]:
    async with open_hub(settings) as hub:
        return await hub.tokens.list_all()


async def revoke_token(settings: HubSettings, token_id: str) -> TokenView:
    async with open_hub(settings) as hub:
        return await hub.tokens.revoke(token_id, actor=SYSTEM)


async def collect_garbage(settings: HubSettings, *, grace_s: float | None) -> Collected:
    """Remove what nothing names; safe beside a running hub."""
    async with open_hub(settings) as hub:
        return await collect_and_note(hub, grace_s=settings.gc_grace_s if grace_s is None else grace_s)


async def check_store(settings: HubSettings, *, read_data: bool) -> Report:
    """Look whether all that is promised is there; only a look at every byte is noted."""
    async with open_hub(settings) as hub:
        report = await check(hub, read_data=read_data)
        if read_data:
            await hub.upkeep.note(
                UpkeepKind.SCRUB,
                succeeded=report.is_sound,
                num_blobs=report.num_blobs,
                num_corrupt=len(set(report.corrupt)),
                num_missing=len(set(report.missing)),
            )
        return report
