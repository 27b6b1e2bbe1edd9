"""The outermost layer: percent-encoded routing, request ids, stalled bodies, counts and the access log. Knows no route.

The framework routes on the decoded path, where `resolve/exp%2F1/x` and `resolve/exp/1/x` look the same; here the path
stays encoded until a handler decodes its own parts.
"""

import asyncio
import logging
import re
import secrets
import time
from typing import Any

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from loractl.hub.metrics import HubMetrics

BODY_IS_CUT = "body_is_cut"
"""In a request's state: its body ended before it was whole."""

_access = logging.getLogger("loractl.hub.access")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Edge:
    """Wraps the application; passes the lifespan through."""

    def __init__(self, app: ASGIApp, *, metrics: HubMetrics, body_timeout_s: float) -> None:
        self._app = app
        self._metrics = metrics
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        method = str(scope.get("method", "")) if scope.get("method") in _METHODS else "other"
        state: dict[str, Any] = scope.setdefault("state", {})
        request_id = state["request_id"] = _request_id(scope)
        scope["path"] = scope["raw_path"].decode("latin-1").partition("?")[0] or "/"
        started = time.perf_counter()
        status = 0
        sent_bytes = 0
        is_stream = False

        async def send_marked(message: Message) -> None:
            nonlocal status, sent_bytes, is_stream
            if message["type"] == "http.response.start":
                status = message["status"]
                is_stream = (b"content-type", b"text/event-stream; charset=utf-8") in message["headers"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            elif message["type"] == "http.response.body":
                sent_bytes += len(message["body"])
            await send(message)

        self._metrics.http_in_flight.inc()
        try:
            await self._app(scope, _bounded(receive, state, self._body_timeout_s), send_marked)
        finally:
            self._metrics.http_in_flight.dec()
            seconds = time.perf_counter() - started
            # The template of the route, never the path: its names are the clients'.
            route = str(scope.get("path_template") or "unknown")
            self._metrics.http_requests.labels(route=route, method=method, code=str(status)).inc()
            # A stream lasts as long as its reader likes, which says nothing of the hub's speed.
            if not is_stream:
                self._metrics.http_seconds.labels(route=route).observe(seconds)
            actor = state.get("actor")
            _access.info(
                "request",
                extra={
                    "request_id": request_id,
                    "method": method,
                    "path": scope["path"],
                    "status": status,
                    "seconds": round(seconds, 4),
                    "sent_bytes": sent_bytes,
                    "actor": None if actor is None else actor.name,
                },
            )


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _request_id(scope: Scope) -> str:
    """The client's id where it is harmless, for the logs only; nothing is ever keyed by it."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(text := value.decode("latin-1")):
            return text
    return secrets.token_hex(8)


def _bounded(receive: Receive, state: dict[str, Any], timeout_s: float) -> Receive:
    """Give up on a client that stops sending in the middle of a body; `state` notes when one stopped or left."""
    is_complete = False

    async def bounded() -> Any:
        nonlocal is_complete
        if is_complete:
            return await receive()
        try:
            async with asyncio.timeout(timeout_s):
                message = await receive()
        except TimeoutError:
            message = {"type": "http.disconnect"}
        is_complete = message["type"] != "http.request" or not message.get("more_body", False)
        state[BODY_IS_CUT] = message["type"] == "http.disconnect"
        return message

    return bounded
