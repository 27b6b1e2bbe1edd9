"""Absolute addresses as clients must see them, and names taken out of percent-encoded paths. No rule."""

from typing import Any
from urllib.parse import unquote

from litestar import Request

from loractl.hub.services import Hub


def public_base(request: "Request[Any, Any, Any]", hub: Hub) -> str:
    """The hub's address as this client wrote it, or as the operator set it.

    Clients refuse an answer whose host is not the one they asked, so it never comes from the address that is bound.
    """
    if hub.settings.public_url is not None:
        return hub.settings.public_url.rstrip("/")
    host = request.headers.get("host", f"{hub.settings.host}:{hub.settings.port}")
    return f"{request.scope['scheme']}://{host}{request.scope.get('root_path', '').rstrip('/')}"


def decoded(part: str) -> str:
    """A path parameter as the client meant it; file paths lose the slash that the router puts in front."""
    return unquote(part)


def decoded_path(part: str) -> str:
    """A parameter that spans the rest of the path, without the slash that the router puts in front."""
    return unquote(part.removeprefix("/"))


def is_true(value: str | None) -> bool:
    """Query booleans as different clients write them: true, True, 1."""
    return (value or "").lower() in {"true", "1"}
