"""Templates to answers: one environment, its filters, and the headers that every page has. Knows no adapter."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import jinja2
from litestar import Request, Response
from markupsafe import Markup

from loractl.adapters.byte_sizes import file_size
from loractl.hub.actor import Actor
from loractl.hub.hf.addresses import public_base

AnyRequest = Request[Any, Any, Any]

_FOLDER = Path(__file__).parent
HEADERS = {
    # No script at all, nothing inline, nothing of other origins: what strangers push stays text.
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_STEPS = ((60.0, "second"), (60.0, "minute"), (24.0, "hour"), (30.0, "day"), (12.0, "month"), (1e9, "year"))


def page(request: AnyRequest, template: str, *, status: int = 200, **values: Any) -> Response[bytes]:
    """Render a page for whoever looks at it."""
    actor: Actor | None = request.scope["state"].get("actor")
    base = public_base(request, request.app.state.hub)
    text = _ENVIRONMENT.get_template(template).render(
        values
        | {
            "root": urlsplit(base).path,
            "hub_url": base,
            "signed_in_as": None if actor is None or actor.is_anonymous else actor.name,
            "address": address_of(request),
        }
    )
    headers = HEADERS | {"Cache-Control": "private, no-cache", "Vary": "Cookie"}
    return Response(text.encode(), status_code=status, headers=headers, media_type="text/html; charset=utf-8")


def static_file(name: str, media_type: str) -> Response[bytes]:
    """A file that the pages load."""
    headers = HEADERS | {"Cache-Control": "public, max-age=300"}
    return Response((_FOLDER / "static" / name).read_bytes(), headers=headers, media_type=media_type)


def address_of(request: AnyRequest) -> str:
    """Where the person is, so that a sign-in leads back."""
    query = request.scope["query_string"].decode("latin-1")
    return request.scope["path"] + (f"?{query}" if query else "")


def ago_text(moment: str) -> Markup:
    """A point in time, how long ago for the reader and in full for who asks."""
    at = datetime.fromisoformat(moment).astimezone(UTC)
    left = max(0.0, time.time() - at.timestamp())
    text = "just now"
    for size, unit in _STEPS:
        if left < size:
            if unit != "second":
                text = f"{left:.0f} {unit}{'' if round(left) == 1 else 's'} ago"
            break
        left /= size
    return Markup('<time datetime="{}" title="{}">{}</time>').format(moment, f"{at:%Y-%m-%d %H:%M:%S} UTC", text)


def figure_text(value: object) -> str:
    """A number or word of a manifest, short."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "—"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(figure_text(one) for one in value) or "—"
    return str(value)


def _query(**values: object) -> str:
    return urlencode({name: value for name, value in values.items() if value})


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": file_size,
        "ago": ago_text,
        "figure": figure_text,
        "quoted": lambda text: quote(str(text), safe=""),
    }
    environment.globals["query"] = _query
    return environment


_ENVIRONMENT = _environment()
