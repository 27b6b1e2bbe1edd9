"""Puts the hub together: services, routes, one guard, one table of errors. Knows no rule."""

import contextlib
from collections.abc import AsyncIterator
from importlib.metadata import version

from litestar import Litestar, Router
from litestar.handlers import HTTPRouteHandler

from loractl.hub.access import DEPENDENCIES, OPT_KEY, authorise
from loractl.hub.api import adapter_routes, event_routes, health_routes, operator_routes, token_routes, webhook_routes
from loractl.hub.api.document import documented, openapi_config
from loractl.hub.background import beside
from loractl.hub.edge import Edge
from loractl.hub.error_answers import EXCEPTION_HANDLERS
from loractl.hub.hf import (
    commit_routes,
    download_routes,
    gap_routes,
    lfs_routes,
    read_routes,
    ref_routes,
    repo_routes,
    xet_routes,
)
from loractl.hub.metrics import HubMetrics
from loractl.hub.pages.router import pages_router
from loractl.hub.scheduled_gc import keep_collecting
from loractl.hub.services import open_hub
from loractl.hub.settings import HubSettings

HF_ROUTES = [
    *repo_routes.ROUTES,
    *read_routes.ROUTES,
    *ref_routes.ROUTES,
    *download_routes.ROUTES,
    *lfs_routes.ROUTES,
    *commit_routes.ROUTES,
    *xet_routes.ROUTES,
    *gap_routes.ROUTES,
]
_OWN_ROUTES = [
    *adapter_routes.ROUTES,
    *event_routes.ROUTES,
    *webhook_routes.ROUTES,
    *operator_routes.ROUTES,
    *token_routes.ROUTES,
]
_ROUTES: list[Router | HTTPRouteHandler] = [
    # Their protocol is written down elsewhere.
    Router("/", route_handlers=HF_ROUTES, include_in_schema=False),
    *documented(_OWN_ROUTES),
    *documented(health_routes.ROUTES, has_errors=False),
    pages_router(),
]


def create_app(settings: HubSettings) -> Litestar:
    """Make the application; database and blobs are opened when it starts and closed when it stops."""
    metrics = HubMetrics()
    metrics.build_info.labels(version=version("loractl")).set(1)

    @contextlib.asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncIterator[None]:
        async with open_hub(settings, metrics=metrics) as hub:
            app.state.hub = hub
            async with beside(hub.feed.run()), beside(hub.dispatcher.run()), beside(keep_collecting(hub)):
                yield

    app = Litestar(
        route_handlers=_ROUTES,
        guards=[authorise],
        dependencies=DEPENDENCIES,
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=[lifespan],
        openapi_config=openapi_config(),
        logging_config=None,
    )
    check_policies(app)
    # Outside of the router, which would decode the path first.
    app.asgi_handler = Edge(app.asgi_handler, metrics=metrics, body_timeout_s=settings.body_timeout_s)
    return app


def check_policies(app: Litestar) -> None:
    """Stop the start when a route was added without saying who may use it."""
    for route in app.routes:
        for handler in getattr(route, "route_handlers", []) or [getattr(route, "route_handler", None)]:
            owner = getattr(handler, "fn", None)
            is_schema = getattr(owner, "__module__", "").startswith("litestar.")
            if handler is not None and not is_schema and OPT_KEY not in handler.opt:
                raise RuntimeError(f"route {route.path} has no policy")
