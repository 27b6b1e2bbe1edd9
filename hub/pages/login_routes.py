"""Signing in with a token, and out again. Translates only."""

from typing import Any
from urllib.parse import urlsplit

from litestar import Response, get, post
from litestar.datastructures import Cookie
from litestar.params import FromQuery

from loractl.adapters.errors import NotAllowed, Unauthenticated
from loractl.hub.access import HubDep, Policy, policy
from loractl.hub.hf.addresses import public_base
from loractl.hub.pages.rendering import AnyRequest, page
from loractl.hub.pages.session import ended_cookie, session_cookie

_MAX_FORM_BYTES = 16 << 10


@get("/login", opt=policy(Policy.PUBLIC))
async def login_page(request: AnyRequest, next_address: FromQuery[str] = "/") -> Response[bytes]:
    """Ask for a token."""
    return page(request, "login.html", next_address=own_address(next_address), failure=None)


@post("/login", opt=policy(Policy.PUBLIC), status_code=303, request_max_body_size=_MAX_FORM_BYTES)
async def login(request: AnyRequest, hub: HubDep) -> Response[Any]:
    """Begin a session for a valid token."""
    _refuse_other_sites(request)
    form = await request.form()
    next_address = own_address(str(form.get("next", "/")))
    secret = str(form.get("token", "")).strip()
    try:
        if not secret:
            raise Unauthenticated("no token was given")
        actor = await hub.tokens.authenticate(secret, request_id=request.scope["state"].get("request_id", ""))
    except Unauthenticated as error:
        hub.metrics.count_error(error)
        failure = "This token is unknown, expired or revoked." if secret else "Paste a token first."
        return page(request, "login.html", status=401, next_address=next_address, failure=failure)
    return _redirect(request, next_address, session_cookie(hub, actor, is_secure=_is_secure(request)))


@post("/logout", opt=policy(Policy.PUBLIC), status_code=303, request_max_body_size=_MAX_FORM_BYTES)
async def logout(request: AnyRequest) -> Response[Any]:
    """End the session in this browser."""
    _refuse_other_sites(request)
    return _redirect(request, "/", ended_cookie(is_secure=_is_secure(request)))


def own_address(text: str) -> str:
    """Where to go after a sign-in: a path of this hub, or the list where `text` is anything else."""
    is_own = text.startswith("/") and not text.startswith(("//", "/\\")) and text.isprintable()
    return text if is_own and len(text) < 2000 else "/"


def _redirect(request: AnyRequest, address: str, cookie: Cookie) -> Response[Any]:
    root = urlsplit(public_base(request, request.app.state.hub)).path
    # 303: the browser asks for the page anew and never repeats the form.
    headers = {"Location": root + address, "Cache-Control": "no-store"}
    return Response(b"", status_code=303, headers=headers, cookies=[cookie], media_type="text/html")


def _is_secure(request: AnyRequest) -> bool:
    return public_base(request, request.app.state.hub).startswith("https://")


def _refuse_other_sites(request: AnyRequest) -> None:
    """Raise NotAllowed for a form that another site sent: it would sign a person in as somebody else."""
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    if site is not None:
        is_own = site in {"same-origin", "none"}
    else:
        is_own = origin is None or urlsplit(origin).netloc == request.headers.get("host")
    if not is_own:
        raise NotAllowed("this form was sent by another site", hint="open the hub's own page and sign in there")


ROUTES = [login_page, login, logout]
