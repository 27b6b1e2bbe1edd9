"""Who looks at a page: a cookie that names a token, signed by the hub. Good for pages alone: no API route reads it.

The token itself is never in the browser: who steals the cookie can read pages until it ends and push nothing. Every
look asks for the token anew, so revoking it signs its holder out.
"""

import re
import time
from typing import Any

from litestar.connection import ASGIConnection
from litestar.datastructures import Cookie

from loractl.adapters.errors import NotAllowed
from loractl.hub.actor import Actor
from loractl.hub.services import Hub

SESSION_COOKIE = "loractl_session"
SESSION_S = 7 * 24 * 3600
_PURPOSE = "page"
_TOKEN_ID = re.compile(r"[0-9a-f]{12}")


def session_cookie(hub: Hub, actor: Actor, *, is_secure: bool) -> Cookie:
    """What the browser keeps: no script can read it, and other sites' forms do not carry it."""
    expires_at = time.time() + SESSION_S
    value = f"{actor.token_id}.{hub.signer.sign(_PURPOSE, actor.token_id, expires_at=expires_at)}"
    return _cookie(value, max_age=SESSION_S, is_secure=is_secure)


def ended_cookie(*, is_secure: bool) -> Cookie:
    """Makes the browser forget the session."""
    return _cookie("", max_age=0, is_secure=is_secure)


async def session_actor(hub: Hub, connection: "ASGIConnection[Any, Any, Any, Any]", *, request_id: str) -> Actor:
    """The holder of the session's token; somebody without a token where there is no session or its token has ended."""
    token_id, _, signature = connection.cookies.get(SESSION_COOKIE, "").partition(".")
    found: Actor | None = None
    if _TOKEN_ID.fullmatch(token_id):
        try:
            hub.signer.check(signature, _PURPOSE, token_id)
        except NotAllowed:
            pass
        else:
            found = await hub.tokens.holder(token_id, request_id=request_id)
    return found or await hub.tokens.authenticate(None, request_id=request_id)


def _cookie(value: str, *, max_age: int, is_secure: bool) -> Cookie:
    return Cookie(
        key=SESSION_COOKIE, value=value, max_age=max_age, path="/", httponly=True, samesite="lax", secure=is_secure
    )
