"""All pages and what they load, as one router with errors for people. Knows no page."""

from litestar import Response, Router, get

from loractl.hub.access import Policy, policy
from loractl.hub.pages import adapter_pages, login_routes
from loractl.hub.pages.page_errors import PAGE_EXCEPTION_HANDLERS
from loractl.hub.pages.rendering import static_file


@get("/static/hub.css", opt=policy(Policy.PUBLIC))
async def style() -> Response[bytes]:
    """How the pages look."""
    return static_file("hub.css", "text/css; charset=utf-8")


@get("/static/icon.svg", opt=policy(Policy.PUBLIC))
async def icon() -> Response[bytes]:
    """The mark in the browser's tab."""
    return static_file("icon.svg", "image/svg+xml")


def pages_router() -> Router:
    """The pages, outside of the API's document."""
    return Router(
        "/",
        route_handlers=[*adapter_pages.ROUTES, *login_routes.ROUTES, style, icon],
        exception_handlers=PAGE_EXCEPTION_HANDLERS,
        include_in_schema=False,
    )
