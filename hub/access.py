"""Who may use which route: each route names its policy, one guard enforces all of them, a route without one is closed.

policy      lets in
PUBLIC      everybody: health, metrics
TOKEN       every valid token (or nobody in particular, where the hub allows that); the service decides the rest
READ        who may see the repo in the path; for all others it does not exist
WRITE       who may also write to it            PROMOTE, ADMIN   likewise
HUB_ADMIN   an admin of everything
SIGNED      who holds an address or session token that the hub signed for exactly this; the route checks it
PAGE        who has signed in with a browser, as TOKEN; a token in a header counts for nothing there, and a
            browser's session for nothing anywhere else
PAGE_READ   likewise, who may see the repo in the path
"""

from enum import StrEnum
from typing import Any
from urllib.parse import unquote

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.di import NamedDependency, Provide
from litestar.handlers import BaseRouteHandler
from litestar.params import SkipValidation

from loractl.adapters.errors import NotAllowed, Unauthenticated
from loractl.hub.actor import Actor, Right
from loractl.hub.pages.session import session_actor
from loractl.hub.registry.records import Repo
from loractl.hub.services import Hub


class Policy(StrEnum):
    """What a route demands; see the table above."""

    PUBLIC = "public"
    TOKEN = "token"  # noqa: S105
    READ = "read"
    WRITE = "write"
    PROMOTE = "promote"
    ADMIN = "admin"
    HUB_ADMIN = "hub_admin"
    SIGNED = "signed"
    PAGE = "page"
    PAGE_READ = "page_read"


OPT_KEY = "policy"
_OF_PAGES = frozenset({Policy.PAGE, Policy.PAGE_READ})

_RIGHTS: dict[Policy, Right] = {
    Policy.READ: "read",
    Policy.PAGE_READ: "read",
    Policy.WRITE: "write",
    Policy.PROMOTE: "promote",
    Policy.ADMIN: "admin",
}

HubDep = NamedDependency[SkipValidation[Hub]]
ActorDep = NamedDependency[SkipValidation[Actor]]
RepoDep = NamedDependency[SkipValidation[Repo]]


async def authorise(connection: "ASGIConnection[Any, Any, Any, Any]", handler: BaseRouteHandler) -> None:
    """The one guard: finds the actor and the repo of the path, and raises unless the route's policy lets them in."""
    policy = handler.opt.get(OPT_KEY)
    if policy is None:
        raise NotAllowed("this route has no policy and is closed")
    if policy in {Policy.PUBLIC, Policy.SIGNED}:
        return
    hub: Hub = connection.app.state.hub
    state = connection.scope["state"]
    request_id = state.get("request_id", "")
    if policy in _OF_PAGES:
        actor = await session_actor(hub, connection, request_id=request_id)
    else:
        actor = await hub.tokens.authenticate(bearer(connection), request_id=request_id)
    state["actor"] = actor
    if actor.is_anonymous and not actor.roles:
        raise Unauthenticated("this hub asks for a token", hint="set HF_TOKEN or LORACTL_TOKEN")
    right = _RIGHTS.get(policy)
    if right is not None:
        state["repo"] = await hub.repos.find(path_repo_id(connection), actor=actor, right=right)
    if policy is Policy.HUB_ADMIN and not actor.is_hub_admin:
        raise NotAllowed("only an admin of the whole hub may do this", hint="use a token with the role admin for *")


def bearer(connection: "ASGIConnection[Any, Any, Any, Any]") -> str | None:
    """The token of `Authorization: Bearer ...`, None without one; raises Unauthenticated for other schemes."""
    header = connection.headers.get("authorization")
    if header is None:
        return None
    scheme, _, secret = header.partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise Unauthenticated("Invalid credentials in Authorization header", hint="send `Authorization: Bearer TOKEN`")
    return secret.strip()


def path_repo_id(connection: "ASGIConnection[Any, Any, Any, Any]") -> str:
    """`team/name` of the route's path; git's way of writing it (`name.git`) too."""
    parameters = connection.path_params
    return f"{unquote(parameters['namespace'])}/{unquote(parameters['name']).removesuffix('.git')}"


def provide_hub(request: "Request[Any, Any, Any]") -> Hub:
    hub: Hub = request.app.state.hub
    return hub


def provide_actor(request: "Request[Any, Any, Any]") -> Actor:
    actor: Actor = request.scope["state"]["actor"]
    return actor


def provide_repo(request: "Request[Any, Any, Any]") -> Repo:
    repo: Repo = request.scope["state"]["repo"]
    return repo


DEPENDENCIES = {
    "hub": Provide(provide_hub, sync_to_thread=False),
    "actor": Provide(provide_actor, sync_to_thread=False),
    "repo": Provide(provide_repo, sync_to_thread=False),
}


def policy(value: Policy, **more: Any) -> dict[str, Any]:
    """A route's options: `opt=policy(Policy.READ)`."""
    return {OPT_KEY: value, **more}
