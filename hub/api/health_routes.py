"""Health and metrics, open to everybody: they name nobody and nothing. Translates only."""

import asyncio
import contextlib
from typing import Any

from litestar import Response, get

from loractl.adapters.errors import Unreachable
from loractl.hub.access import HubDep, Policy, policy

# Litestar adds the charset.
_PROMETHEUS = "text/plain; version=0.0.4"


@get("/healthz", opt=policy(Policy.PUBLIC))
async def healthz() -> dict[str, Any]:
    """The process answers."""
    return {"status": "ok"}


@get("/readyz", opt=policy(Policy.PUBLIC))
async def readyz(hub: HubDep) -> Response[dict[str, Any]]:
    """Database and blobs answer too."""
    checks = await _checks(hub)
    is_ready = all(checks.values())
    return Response({"ready": is_ready, **checks}, status_code=200 if is_ready else 503)


@get("/metrics", opt=policy(Policy.PUBLIC), media_type=_PROMETHEUS)
async def metrics(hub: HubDep) -> Response[bytes]:
    """The page for Prometheus."""
    checks = await _checks(hub)
    # Without its database the hub still says so here: that is when the page is needed. It may go away meanwhile.
    if checks["database"]:
        with contextlib.suppress(Unreachable):
            await _count(hub)
    for state, num_connections in hub.database.connections().items():
        hub.metrics.db_connections.labels(state=state).set(num_connections)
    if checks["blobs"] and (free := await hub.store.free_bytes()) is not None:
        hub.metrics.storage_free_bytes.set(free)
    return Response(hub.metrics.text(), media_type=_PROMETHEUS)


async def _count(hub: HubDep) -> None:
    """Note in the metrics how much there is."""
    num_blobs, blob_bytes = await hub.ledger.totals()
    num_repos, num_commits = await hub.catalogue.totals()
    hub.metrics.blobs.set(num_blobs)
    hub.metrics.blob_bytes.set(blob_bytes)
    hub.metrics.repos.set(num_repos)
    hub.metrics.revisions.set(num_commits)
    num_pending, lag_s = await hub.webhooks.backlog()
    hub.metrics.deliveries_pending.set(num_pending)
    hub.metrics.webhook_lag.set(lag_s)
    hub.metrics.upkeep.totals = await hub.upkeep.totals()


async def _checks(hub: HubDep) -> dict[str, bool]:
    """Ask what the hub depends on, and note in the metrics whether all of it answers."""
    database, blobs = await asyncio.gather(hub.database.is_alive(), hub.store.is_alive())
    checks = {"database": database, "blobs": blobs}
    hub.metrics.ready.set(all(checks.values()))
    return checks


ROUTES = [healthz, readyz, metrics]
