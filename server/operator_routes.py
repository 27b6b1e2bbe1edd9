"""For those who run the server: health, metrics, status, and the admin calls that load, pin, unload and drain."""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, get, post
from litestar.handlers import HTTPRouteHandler
from msgspec import Meta

from loractl.server.engine_metrics import kv_usage, routing_page
from loractl.server.http_input import read_body
from loractl.server.openai_errors import decode_body
from loractl.server.serving import Serving
from loractl.server.vllm_metrics import vllm_routing_page

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class NamedAdapter(msgspec.Struct, forbid_unknown_fields=True):
    """The body of an admin call about one adapter."""

    name: Annotated[str, Meta(min_length=1, max_length=512)]


class AdapterStatus(msgspec.Struct, kw_only=True):
    """One resident adapter."""

    name: str
    digest: str
    level: str
    rank: int | None = None
    pinned: bool = False
    num_running: int = 0


class Status(msgspec.Struct, kw_only=True):
    """What `loractl status` shows."""

    base: str
    state: str
    ready: bool
    draining: bool
    quantization: str
    dtype: str | None
    targets: list[str]
    max_model_len: int
    hub_up: bool | None
    running: int
    waiting: dict[str, int]
    num_slots: int
    max_rank: int
    kv_usage_ratio: float
    max_distinct_adapters_in_step: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_steps: int
    adapters: list[AdapterStatus]


class Health(msgspec.Struct):
    """One word on how the server is."""

    status: str


class Drained(msgspec.Struct):
    """The answer when nothing runs any more."""

    status: str = "drained"


class Done(msgspec.Struct, kw_only=True):
    """The answer of an admin call."""

    name: str
    digest: str
    action: str


def operator_routes(serving: Serving) -> Sequence[HTTPRouteHandler]:
    """The handlers, bound to one server."""
    return [*_health_routes(serving), *_admin_routes(serving)]


def _health_routes(serving: Serving) -> Sequence[HTTPRouteHandler]:
    @get(["/healthz", "/health/live"])
    async def live() -> Response[bytes]:
        is_alive = serving.bridge.is_alive
        return _json(Health("ok" if is_alive else serving.bridge.state), 200 if is_alive else 503)

    @get(["/readyz", "/health/ready"])
    async def ready() -> Response[bytes]:
        state = "draining" if serving.is_draining else serving.bridge.state
        return _json(Health("ready" if serving.is_ready else state), 200 if serving.is_ready else 503)

    @get("/health/startup")
    async def startup() -> Response[bytes]:
        is_up = serving.bridge.state != "starting"
        return _json(Health("started" if is_up else "starting"), 200 if is_up else 503)

    @get("/metrics")
    async def metrics() -> Response[bytes]:
        page = await asyncio.to_thread(serving.metrics.page)
        return Response(page, media_type=_METRICS_TYPE)

    @get("/metrics/routing")
    async def routing() -> Response[bytes]:
        seen = serving.snapshot()
        page = routing_page(seen) + (vllm_routing_page(seen) if serving.settings.vllm_metrics else "")
        return Response(page.encode(), media_type=_METRICS_TYPE)

    return [live, ready, startup, metrics, routing]


def _admin_routes(serving: Serving) -> Sequence[HTTPRouteHandler]:
    async def check(request: Request[Any, Any, Any]) -> None:
        await serving.access.check_admin(request.headers.get("authorization"))

    async def named(request: Request[Any, Any, Any]) -> str:
        await check(request)
        return decode_body(await read_body(request, serving.settings), NamedAdapter).name

    @get("/admin/status")
    async def status(request: Request[Any, Any, Any]) -> Response[bytes]:
        await check(request)
        return _json(_status(serving))

    @post("/admin/adapters/load", status_code=200)
    async def load(request: Request[Any, Any, Any]) -> Response[bytes]:
        found = await _bring(serving, await named(request))
        return _json(Done(name=found.name, digest=found.digest, action="loading"))

    @post("/admin/adapters/prefetch", status_code=200)
    async def prefetch(request: Request[Any, Any, Any]) -> Response[bytes]:
        found = await serving.source.find(await named(request))
        return _json(Done(name=found.name, digest=found.digest, action="on disk"))

    @post("/admin/adapters/pin", status_code=200)
    async def pin(request: Request[Any, Any, Any]) -> Response[bytes]:
        found = await _bring(serving, await named(request))
        await asyncio.to_thread(serving.bridge.engine.pin, found.digest)
        return _json(Done(name=found.name, digest=found.digest, action="pinned"))

    @post("/admin/adapters/unpin", status_code=200)
    async def unpin(request: Request[Any, Any, Any]) -> Response[bytes]:
        name = await named(request)
        digest = serving.digest_of(name)
        await asyncio.to_thread(serving.bridge.engine.unpin, digest)
        return _json(Done(name=name, digest=digest, action="unpinned"))

    @post("/admin/adapters/unload", status_code=200)
    async def unload(request: Request[Any, Any, Any]) -> Response[bytes]:
        name = await named(request)
        digest = serving.digest_of(name)
        await asyncio.to_thread(serving.bridge.engine.unload, digest)
        return _json(Done(name=name, digest=digest, action="unloading"))

    @post("/admin/drain", status_code=200)
    async def drain(request: Request[Any, Any, Any]) -> Response[bytes]:
        await check(request)
        with contextlib.suppress(asyncio.CancelledError):
            await serving.drain()
        return _json(Drained())

    return [status, load, prefetch, pin, unpin, unload, drain]


async def _bring(serving: Serving, name: str) -> Any:
    """Fetch an adapter and send it on its way to the device."""
    from loractl.server.generation import ServedAdapter

    found = await serving.source.find(name)
    serving.metrics.name_adapter(found.digest, found.name)
    serving.bridge.engine.prefetch(ServedAdapter(found=found).use)
    return found


def _status(serving: Serving) -> Status:
    seen = serving.snapshot()
    stats = seen.stats
    adapters = [
        AdapterStatus(
            name=seen.name(slot.digest),
            digest=slot.digest,
            level="loading" if slot.loading else "device",
            rank=slot.rank,
            pinned=slot.pinned,
            num_running=slot.num_running,
        )
        for slot in stats.slots
    ]
    resident = {slot.digest for slot in stats.slots}
    adapters += [
        AdapterStatus(name=seen.name(digest), digest=digest, level="host")
        for digest in stats.host_digests
        if digest not in resident
    ]
    return Status(
        base=serving.settings.base_name,
        state=serving.bridge.state,
        ready=serving.is_ready,
        draining=serving.is_draining,
        quantization=serving.settings.quantization,
        dtype=serving.settings.dtype,
        targets=list(serving.settings.targets),
        max_model_len=serving.bridge.max_model_len,
        hub_up=serving.source.hub_is_up,
        running=stats.running,
        waiting=dict(stats.waiting),
        num_slots=stats.num_slots,
        max_rank=stats.max_rank,
        kv_usage_ratio=kv_usage(stats),
        max_distinct_adapters_in_step=stats.counters.max_distinct_adapters_in_step,
        num_prompt_tokens=stats.counters.num_prompt_tokens,
        num_generated_tokens=stats.counters.num_generated_tokens,
        num_steps=stats.counters.num_steps,
        adapters=adapters,
    )


def _json(value: object, status: int = 200) -> Response[bytes]:
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")
