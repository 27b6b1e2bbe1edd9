"""What went wrong, as a page instead of JSON. Knows the error tree, no route."""

from typing import Any

from litestar import Response
from litestar.exceptions import HTTPException

from loractl.adapters.errors import BadRequest, LoractlError, Unauthenticated
from loractl.hub.error_answers import answer_fault, answer_moved
from loractl.hub.pages.rendering import AnyRequest, address_of, page
from loractl.hub.registry.repos import RepoMoved


def page_of_error(request: AnyRequest, error: LoractlError) -> Response[Any]:
    """Tell a person; who may not read here at all is asked to sign in, whatever they looked for."""
    request.app.state.hub.metrics.count_error(error)
    if isinstance(error, Unauthenticated):
        return page(request, "login.html", status=401, next_address=address_of(request), failure=None)
    return page(request, "error.html", status=error.status, message=error.message, hint=error.hint)


def page_of_http_error(request: AnyRequest, error: HTTPException) -> Response[Any]:
    """What the framework refuses by itself."""
    return page(request, "error.html", status=error.status_code, message=error.detail or BadRequest.code, hint=None)


PAGE_EXCEPTION_HANDLERS: dict[type[Exception] | int, Any] = {
    LoractlError: page_of_error,
    RepoMoved: answer_moved,
    HTTPException: page_of_http_error,
    Exception: answer_fault,
}
