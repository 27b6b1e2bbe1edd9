"""Every failure in OpenAI's shape: our own errors, Litestar's, and bodies that do not parse. Refuses to lose the field.

{"error": {"message": ..., "type": ..., "param": ..., "code": ..., "hint": ...}}
"""

import logging
import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException
from msgspec import UNSET

from loractl.adapters import errors
from loractl.server.openai_replies import ErrorBody, ErrorReply

log = logging.getLogger("loractl.server")

_T = TypeVar("_T")

_TYPES: dict[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    503: "service_unavailable_error",
}
# OpenAI's own codes, where it has one; every other error carries its class's code in lower case.
_CODES: dict[type[errors.LoractlError], str] = {
    errors.RepoNotFound: "model_not_found",
    errors.RevisionNotFound: "model_not_found",
    errors.Unauthenticated: "invalid_api_key",
    errors.Overloaded: "rate_limit_exceeded",
}
_ELSEWHERE: Mapping[str, str] = {
    "/v1/messages": "Anthropic's API is not served: use /v1/chat/completions, or LiteLLM's hosted_vllm/ in front",
    "/v1/responses": "the Responses API is not served: use /v1/chat/completions",
    **{
        f"/v1/{name}": f"{name} are not served here: chats, completions and embeddings are"
        for name in ("assistants", "threads", "images", "audio", "moderations", "batches", "files", "fine_tuning")
    },
    "/v1/load_lora_adapter": "adapters load when they are asked for; /admin/adapters/load brings one ahead",
    "/v1/unload_lora_adapter": "/admin/adapters/unload takes an adapter off the device",
}
_UNKNOWN_FIELD = re.compile(
    r"^Object contains unknown field `(?P<field>.*?)`(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL
)
_MISSING_FIELD = re.compile(
    r"^Object missing required field `(?P<field>.*?)`(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL
)
_WRONG_VALUE = re.compile(r"^(?P<what>.*?) - at (?:`key` in )?`\$\.?(?P<path>.*)`$", re.DOTALL)


def decode_body(body: bytes, wanted: type[_T]) -> _T:
    """Decode a JSON body into a closed struct; raises BadRequest naming the field."""
    try:
        return msgspec.json.decode(body, type=wanted)
    except msgspec.ValidationError as error:
        raise _refused_field(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise errors.BadRequest(f"the body is not valid JSON: {error}", hint="send one JSON object") from error
    except RecursionError as error:
        raise errors.BadRequest("the body is nested too deeply") from error


def _refused_field(text: str) -> errors.BadRequest:
    if found := _UNKNOWN_FIELD.match(text):
        field = _join(found["path"], found["field"])
        return errors.BadRequest(f"unknown field: {field}", hint="remove it, or check its spelling", field=field)
    if found := _MISSING_FIELD.match(text):
        field = _join(found["path"], found["field"])
        return errors.BadRequest(f"missing field: {field}", field=field)
    if found := _WRONG_VALUE.match(text):
        return errors.BadRequest(f"{found['path']}: {found['what']}", field=found["path"] or None)
    return errors.BadRequest(text)


def _join(path: str | None, field: str) -> str:
    return f"{path}.{field}"[:256] if path else field[:256]


def error_reply(error: errors.LoractlError) -> ErrorReply:
    """Put an error into OpenAI's shape."""
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    code = next((_CODES[cls] for cls in type(error).__mro__ if cls in _CODES), error.code.lower())
    hint = error.hint or UNSET
    return ErrorReply(ErrorBody(message=error.message, type=kind, param=error.field, code=code, hint=hint))


def error_headers(error: errors.LoractlError) -> dict[str, str]:
    """`Retry-After` where waiting helps, `WWW-Authenticate` where a key does."""
    headers: dict[str, str] = {}
    retry_after_s = error.retry_after_s
    if retry_after_s is None and error.status in {429, 503}:
        retry_after_s = 1.0
    if retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def as_response(error: errors.LoractlError) -> Response[bytes]:
    return _json(error.status, error_reply(error), error_headers(error))


def _refusal(status: int, message: str, *, code: str, hint: str | None = None) -> Response[bytes]:
    body = ErrorBody(message=message, type="invalid_request_error", code=code, hint=hint or UNSET)
    return _json(status, ErrorReply(body), {})


def _json(status: int, reply: ErrorReply, headers: dict[str, str]) -> Response[bytes]:
    return Response(msgspec.json.encode(reply), status_code=status, media_type="application/json", headers=headers)


def on_loractl_error(request: Request[Any, Any, Any], error: errors.LoractlError) -> Response[bytes]:
    """Litestar's handler for our own errors; only the server's faults are logged, never what was asked."""
    if error.status >= 500 and error.status != 503:
        log.error("%s on %s %s", error.code, request.method, request.url.path, exc_info=error)
    return as_response(error)


def on_http_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """Litestar's own refusals: unknown path, method, size."""
    path = request.url.path[:256]
    if error.status_code == 404:
        hint = next((hint for start, hint in _ELSEWHERE.items() if path.startswith(start)), "the API is under /v1")
        return _refusal(404, f"no such path: {request.method} {path}", code="unknown_url", hint=hint)
    if error.status_code == 405:
        response = _refusal(405, f"{request.method} is not allowed on {path}", code="method_not_allowed")
        response.headers.update(error.headers or {})
        return response
    if error.status_code == 413:
        return _refusal(413, "the body is larger than this server accepts", code="body_too_large")
    if error.status_code < 500:
        return _refusal(error.status_code, str(error.detail), code="bad_request")
    return on_unexpected(request, error)


def on_unexpected(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """A bug of ours: the client learns that, and where to look, and nothing else."""
    log.error("unexpected %s on %s %s", type(error).__name__, request.method, request.url.path, exc_info=error)
    return as_response(errors.LoractlError("internal error", hint="the server's log has the details"))


EXCEPTION_HANDLERS: Mapping[int | type[Exception], Any] = {
    errors.LoractlError: on_loractl_error,
    HTTPException: on_http_error,
    500: on_unexpected,
}
