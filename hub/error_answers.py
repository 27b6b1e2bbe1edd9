"""One table from errors to answers, the same body on every route. Knows what Hugging Face clients understand.

class                    status   X-Error-Code          what a stock client raises
RepoNotFound             404      RepoNotFound          RepositoryNotFoundError (also for private repos of others)
Unauthenticated          401      RepoNotFound          the same; none when a token was sent and is not valid
RevisionNotFound         404      RevisionNotFound      RevisionNotFoundError
EntryNotFound            404      EntryNotFound         RemoteEntryNotFoundError
other LoractlError       its own  -                     BadRequestError, HfHubHTTPError with the text
RepoMoved                307      -                     follows
anything else            500      -                     HfHubHTTPError; the log has the trace, the answer has not
"""

import logging
import re
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException

from loractl.adapters.errors import (
    BadRequest,
    Conflict,
    EntryNotFound,
    LoractlError,
    NotFound,
    Overloaded,
    RepoNotFound,
    RevisionNotFound,
    Unauthenticated,
)
from loractl.hub.edge import BODY_IS_CUT
from loractl.hub.registry.repos import RepoMoved
from loractl.hub.wire import API_PREFIX, ErrorBody

_log = logging.getLogger("loractl.hub")

AnyRequest = Request[Any, Any, Any]

_HF_CODES: dict[type[LoractlError], str] = {
    RepoNotFound: "RepoNotFound",
    RevisionNotFound: "RevisionNotFound",
    EntryNotFound: "EntryNotFound",
}
# A name may hold any of them, and the HTTP server drops a whole answer for one in a header.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
INVALID_CREDENTIALS = "Invalid credentials in Authorization header"


def answer_error(request: AnyRequest, error: LoractlError) -> Response[Any]:
    """The answer to a typed error."""
    request.app.state.hub.metrics.count_error(error)
    if error.status >= 500:
        _log.warning("%s: %s", error.code, error.message)
    headers = {"X-Error-Message": header_text(error.message)}
    hf_code = _HF_CODES.get(type(error))
    if isinstance(error, Unauthenticated) and error.message != INVALID_CREDENTIALS:
        hf_code = "RepoNotFound"
    if hf_code is not None:
        headers["X-Error-Code"] = hf_code
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    elif isinstance(error, Overloaded):
        headers["Retry-After"] = "1"
    body = ErrorBody(
        error=_text_of(request, error),
        code=error.code,
        hint=error.hint,
        field=error.field,
        request_id=request.scope["state"].get("request_id"),
    )
    return _response(request, body, error.status, headers)


def _text_of(request: AnyRequest, error: LoractlError) -> str:
    """Stock clients print `error` alone, so the hint rides in it; our own print it apart."""
    if error.hint is None or request.scope["path"].startswith(API_PREFIX):
        return error.message
    return f"{error.message} ({error.hint})"


def answer_http_error(request: AnyRequest, error: HTTPException) -> Response[Any]:
    """The answer to what Litestar refuses by itself: unknown routes, bodies that are not what the route takes."""
    status, detail = error.status_code, error.detail
    if status == 500 and request.scope["state"].get(BODY_IS_CUT):
        # The framework takes that for a fault of its own.
        status, detail = 400, "the client stopped sending in the middle of the body"
    if status == 405 and not request.scope["path"].startswith("/api/"):
        # A page is at TEAM/NAME; clients that ask something else of such an address go on from a 404 alone.
        status, detail = 404, "Not Found"
    kind: type[LoractlError] = NotFound if status == 404 else BadRequest
    if isinstance(error.extra, list) and error.extra:
        detail = "; ".join(f"{item.get('key', 'body')}: {item.get('message', '')}" for item in error.extra)
    body = ErrorBody(error=detail, code=kind.code, request_id=request.scope["state"].get("request_id"))
    headers = dict(error.headers or {}) | {"X-Error-Message": header_text(detail)}
    return _response(request, body, status, headers)


def answer_moved(request: AnyRequest, error: RepoMoved) -> Response[Any]:
    """Lead a client that asks for an old name to the present one."""
    parameters = request.path_params
    if "namespace" not in parameters:
        # The name came in the body: there is no other address to ask at.
        moved = Conflict(f"the repo is now {error.repo_id}", hint="use that name")
        return answer_error(request, moved)
    old = f"{parameters.get('namespace')}/{parameters.get('name')}"
    path = request.scope["path"].replace(old, error.repo_id, 1)
    query = request.scope["query_string"].decode("latin-1")
    return _response(
        request,
        ErrorBody(error=f"the repo is now {error.repo_id}", code="MOVED"),
        307,
        {"Location": path + (f"?{query}" if query else "")},
    )


def answer_fault(request: AnyRequest, error: Exception) -> Response[Any]:
    """The answer to our own fault: nothing of it leaves the hub but the id under which the log has it."""
    _log.error("unexpected %s", type(error).__name__, exc_info=error)
    body = ErrorBody(
        error="the hub failed; its log has the reason",
        code="INTERNAL",
        request_id=request.scope["state"].get("request_id"),
    )
    return _response(request, body, 500, {})


def _response(request: AnyRequest, body: ErrorBody, status: int, headers: dict[str, str]) -> Response[Any]:
    if request.method == "HEAD":
        return Response(content=b"", status_code=status, headers=headers, media_type="application/json")
    return Response(
        content=msgspec.json.encode(body), status_code=status, headers=headers, media_type="application/json"
    )


def header_text(message: str) -> str:
    """A text as a header may hold it: one line of Latin-1 without control characters, at most 1,000 of them."""
    return _CONTROL.sub(" ", message).encode("latin-1", "replace").decode("latin-1")[:1000]


EXCEPTION_HANDLERS: dict[type[Exception] | int, Any] = {
    LoractlError: answer_error,
    RepoMoved: answer_moved,
    HTTPException: answer_http_error,
    Exception: answer_fault,
}
