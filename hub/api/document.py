"""The OpenAPI document of the hub's own API, and a page that shows it without a script from anywhere. Knows no rule."""

import inspect
import json
from collections.abc import Iterable
from html import escape
from importlib.metadata import version
from typing import Any

from litestar import Request, Router
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.plugins import OpenAPIRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme

from loractl.hub.access import OPT_KEY, Policy, policy
from loractl.hub.wire import API_PREFIX, ErrorBody

SCHEMA_PATH = API_PREFIX + "/schema"

_ERRORS = {
    400: "A field or the whole of the request cannot be meant.",
    401: "No token, or one that is unknown, expired or revoked.",
    403: "The token lacks the right.",
    404: "Not there, or private and not visible to this token.",
    409: "Somebody else changed it first, or the name is taken.",
    410: "Events that are no longer kept.",
    413: "Too large, or beyond a quota.",
    429: "Too many at once; `Retry-After` says when to ask again.",
    503: "The database or the store of blobs does not answer.",
}

_WHO = {
    Policy.PUBLIC: "everybody",
    Policy.TOKEN: "every valid token; what it may not see is left out, what it may not do is refused",
    Policy.READ: "who may read the repo; to others it does not exist",
    Policy.WRITE: "who may write to the repo",
    Policy.PROMOTE: "who may promote in the repo",
    Policy.ADMIN: "admins of the repo",
    Policy.HUB_ADMIN: "admins of the whole hub",
}
_SCHEME = "token"
_BREAK = "\n\n"

_STYLE = """
:root { color-scheme: light dark } body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
padding: 0 1rem } code, pre { font: 14px/1.5 ui-monospace, monospace } pre { overflow: auto; padding: .75rem;
border: 1px solid #8886; border-radius: .5rem } section { border-top: 1px solid #8886; padding: .5rem 0 }
h2 { font-size: 1rem; overflow-wrap: anywhere } .method { display: inline-block; min-width: 4rem; font-weight: 700 }
"""


def documented(routes: Iterable[HTTPRouteHandler], *, has_errors: bool = True) -> list[HTTPRouteHandler]:
    """Give every route a name, its docstring, who may use it, and the one shape of errors."""
    errors = {
        status: ResponseSpec(ErrorBody, generate_examples=False, description=text) for status, text in _ERRORS.items()
    }
    found = list(routes)
    for route in found:
        who = Policy(route.opt[OPT_KEY])
        route.summary = route.handler_name.replace("_", " ").capitalize()
        route.description = f"{inspect.getdoc(route.fn)}{_BREAK}For {_WHO[who]}."
        if who is not Policy.PUBLIC:
            route.security = [{_SCHEME: []}]
        if has_errors:
            route.responses = errors | dict(route.responses or {})
    return found


def openapi_config() -> OpenAPIConfig:
    """Document at `SCHEMA_PATH/openapi.json`, page at `SCHEMA_PATH`; open to everybody, as they name nobody."""
    return OpenAPIConfig(
        title="loractl hub",
        version=version("loractl"),
        description="What the Hugging Face protocol lacks: channels with history, records, events, webhooks, quotas.",
        create_examples=False,
        components=Components(
            security_schemes={_SCHEME: SecurityScheme(type="http", scheme="bearer", description="A token of the hub.")}
        ),
        render_plugins=[_Page(path="/")],
        openapi_router=Router(SCHEMA_PATH, route_handlers=[], opt=policy(Policy.PUBLIC), include_in_schema=False),
    )


class _Page(OpenAPIRenderPlugin):
    """The document as a page for people."""

    def render(self, request: "Request[Any, Any, Any]", openapi_schema: dict[str, Any]) -> bytes:
        del request
        routes = [
            _route(path, method, operation)
            for path, item in openapi_schema.get("paths", {}).items()
            for method, operation in item.items()
            if isinstance(operation, dict)
        ]
        schemas = openapi_schema.get("components", {}).get("schemas", {})
        shapes = [
            f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary>{_json(schema)}</details>'
            for name, schema in sorted(schemas.items())
        ]
        title = escape(openapi_schema["info"]["title"])
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width"><link rel="icon" href="/static/icon.svg">'
            f"<style>{_STYLE}</style></head><body>"
            f'<h1>{title}</h1><p>The document: <a href="{SCHEMA_PATH}/openapi.json">openapi.json</a></p>'
            f"{''.join(routes)}<h1>Shapes</h1>{''.join(shapes)}</body></html>"
        )
        return page.encode()


def _route(path: str, method: str, operation: dict[str, Any]) -> str:
    parameters = "".join(
        f"<li><code>{escape(one['name'])}</code> in {escape(one['in'])}"
        f"{', required' if one.get('required') else ''}</li>"
        for one in operation.get("parameters", [])
    )
    statuses = "".join(
        f"<li><code>{escape(status)}</code> {escape(answer.get('description', ''))} {_names(answer)}</li>"
        for status, answer in operation.get("responses", {}).items()
    )
    body = _names(operation["requestBody"]) if "requestBody" in operation else ""
    return (
        f'<section><h2><span class="method">{escape(method.upper())}</span> <code>{escape(path)}</code>'
        f" {escape(operation['summary'])}</h2>"
        f"{''.join(f'<p>{escape(part)}</p>' for part in operation['description'].split(_BREAK))}"
        f"{f'<p>Body: {body}</p>' if body else ''}<ul>{parameters}</ul>"
        f"<details><summary>Answers</summary><ul>{statuses}</ul></details></section>"
    )


def _names(part: dict[str, Any]) -> str:
    """Links to the shapes that a body may have."""
    refs = [media.get("schema", {}).get("$ref", "") for media in part.get("content", {}).values()]
    names = [ref.rpartition("/")[2] for ref in refs if ref]
    return " ".join(f'<a href="#{escape(name)}"><code>{escape(name)}</code></a>' for name in names)


def _json(schema: dict[str, Any]) -> str:
    return f"<pre>{escape(json.dumps(schema, indent=2))}</pre>"
