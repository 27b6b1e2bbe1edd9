"""What Hugging Face clients may ask and this hub does not have, answered with the reason instead of a bare 404."""

from typing import Any

import msgspec
from litestar import Request, Response, route
from litestar.enums import HttpMethod

from loractl.hub.access import Policy, policy
from loractl.hub.wire import ErrorBody

_METHODS = [HttpMethod.GET, HttpMethod.POST, HttpMethod.PUT, HttpMethod.DELETE, HttpMethod.PATCH]

_GAPS = {
    "datasets": ["/api/datasets", "/api/datasets/{rest:path}"],
    "spaces": ["/api/spaces", "/api/spaces/{rest:path}"],
    "collections": ["/api/collections", "/api/collections/{rest:path}"],
    "webhooks by this call": ["/api/settings/webhooks", "/api/settings/webhooks/{rest:path}"],
    "discussions": [
        "/api/models/{namespace:str}/{name:str}/discussions",
        "/api/models/{namespace:str}/{name:str}/discussions/{rest:path}",
    ],
    "rewriting history": [
        "/api/models/{namespace:str}/{name:str}/super-squash/{branch:str}",
        "/api/models/{namespace:str}/{name:str}/lfs-files/batch",
    ],
    "logging in by device": ["/oauth/device"],
}


@route(
    [path for paths in _GAPS.values() for path in paths],
    http_method=_METHODS,
    opt=policy(Policy.PUBLIC),
    include_in_schema=False,
    status_code=501,
)
async def not_here(request: "Request[Any, Any, Any]") -> Response[bytes]:
    """Say what is not supported."""
    template = str(request.scope.get("path_template"))
    what = next((what for what, paths in _GAPS.items() if _template_of(paths, template)), "this")
    message = f"{what}: not supported by this hub, which keeps adapters only"
    body = msgspec.json.encode(ErrorBody(error=message, code="NOT_SUPPORTED"))
    return Response(body, media_type="application/json", status_code=501, headers={"X-Error-Message": message})


def _template_of(paths: list[str], template: str) -> bool:
    return any(template.startswith(path.split("{rest")[0].replace(":str", "").rstrip("/")) for path in paths)


ROUTES = [not_here]
