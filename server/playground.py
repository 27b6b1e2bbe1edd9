"""The page at the server's address: two adapters, one prompt, both answers side by side. Asks `/v1` alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from litestar import Request, Response, get
from litestar.handlers import HTTPRouteHandler

from loractl.server.serving import Serving

_FOLDER = Path(__file__).parent
_STATIC = {
    "playground.js": "text/javascript; charset=utf-8",
    "playground.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_HEADERS = {
    # Nothing of other origins, nothing inline, no frame around the page: an answer that holds markup stays text.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def playground_routes(serving: Serving) -> Sequence[HTTPRouteHandler]:
    """The page and its three files, bound to one server."""
    loader = jinja2.FileSystemLoader(_FOLDER / "templates")
    template = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        "playground.html"
    )
    files = {name: (_FOLDER / "static" / name).read_bytes() for name in _STATIC}

    @get("/")
    async def page(request: Request[Any, Any, Any]) -> Response[bytes]:
        base, is_open = serving.settings.base_name, serving.access.is_open
        # Names of adapters are for those who may use them; with keys, the script asks with the key that is typed in.
        models = [base, *serving.source.local] if is_open else [base]
        chosen = [request.query_params.get(side, "")[:512] for side in ("a", "b")]
        text = template.render(
            base=base,
            quantization=serving.settings.quantization,
            models=models,
            needs_key=not is_open,
            first=chosen[0] or models[min(1, len(models) - 1)],
            second=chosen[1] or base,
        )
        return Response(text.encode(), headers=_HEADERS, media_type="text/html; charset=utf-8")

    def file_route(name: str, media_type: str) -> HTTPRouteHandler:
        @get(f"/playground/{name}")
        async def file() -> Response[bytes]:
            return Response(files[name], headers=_HEADERS, media_type=media_type)

        return file

    return [page, *(file_route(name, media_type) for name, media_type in _STATIC.items())]
