"""The application: routes on one server, error shapes, a request id on every answer, and one log line. No decisions."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from litestar import Litestar
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from prometheus_client.registry import Collector

from loractl.server.api_document import document_routes
from loractl.server.completion_routes import TRACE, completion_routes
from loractl.server.embedding_routes import embedding_routes
from loractl.server.engine_metrics import EngineCollector
from loractl.server.loop_lag import watch_lag
from loractl.server.model_routes import model_routes
from loractl.server.openai_errors import EXCEPTION_HANDLERS
from loractl.server.operator_routes import operator_routes
from loractl.server.playground import playground_routes
from loractl.server.serving import Serving
from loractl.server.vllm_metrics import VllmAliases

log = logging.getLogger("loractl.server.access")


def create_app(serving: Serving) -> ASGIApp:
    """Build the ASGI application of one server; it starts the engine's thread and ends it."""

    @asynccontextmanager
    async def life(app: Litestar) -> AsyncIterator[None]:
        del app
        await serving.bridge.start()
        collector = EngineCollector(serving.snapshot, disk=serving.disk)
        collectors: list[Collector] = [collector]
        if serving.settings.vllm_metrics:
            collectors.append(VllmAliases(collector, serving.metrics, model_name=serving.settings.base_name))
        for each in collectors:
            serving.metrics.registry.register(each)
        lag = asyncio.create_task(watch_lag(serving.metrics.loop_lag.observe))
        if serving.hub_events is not None:
            serving.hub_events.start()
        try:
            yield
        finally:
            for each in collectors:
                serving.metrics.registry.unregister(each)
            lag.cancel()
            if serving.hub_events is not None:
                await serving.hub_events.close()
            await serving.bridge.stop()
            await serving.source.close()
            serving.prompts.close()
            await serving.access.close()
            if serving.tracing is not None:
                await asyncio.to_thread(serving.tracing.close)

    app = Litestar(
        route_handlers=[
            *completion_routes(serving),
            *embedding_routes(serving),
            *model_routes(serving),
            *operator_routes(serving),
            *playground_routes(serving),
            *document_routes(),
        ],
        lifespan=[life],
        exception_handlers=dict(EXCEPTION_HANDLERS),
        request_max_body_size=serving.settings.max_body_bytes,
        openapi_config=None,
        logging_config=None,
    )
    paths = {route.path for route in app.routes}
    return _Outermost(app, serving, paths)


class _Outermost:
    """Gives every answer an id, counts it, and logs it without what was asked or said."""

    def __init__(self, app: ASGIApp, serving: Serving, paths: set[str]) -> None:
        self._app = app
        self._metrics = serving.metrics
        self._tracing = serving.tracing
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        request_id, started = f"req_{uuid.uuid4().hex}", time.monotonic()
        status, digest, method = 0, "", str(scope.get("method", ""))
        trace = None if self._tracing is None else self._tracing.begin(method, scope["path"], scope["headers"])
        scope.setdefault("state", {})[TRACE] = trace

        async def named_send(message: Message) -> None:
            nonlocal status, digest
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message.get("headers", []))
                digest = next((value.decode() for name, value in headers if name == b"x-loractl-adapter"), "")
                message["headers"] = [*headers, (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, named_send)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, str(status)).inc()
            facts: dict[str, object] = {
                "request_id": request_id,
                "method": method,
                "path": path,
                "status": status,
                "adapter": digest,
                "seconds": round(time.monotonic() - started, 4),
            }
            if trace is not None:
                facts["trace_id"] = trace.trace_id
                trace.end(status, request_id=request_id)
            log.info("request", extra={"facts": facts})
