"""Who am I, and repos as a whole: create, delete, move, settings. Translates only."""

from typing import Any

import msgspec
from litestar import Request, Response, delete, get, post, put
from litestar.params import JSONBody

from loractl.adapters.errors import BadRequest
from loractl.hub.access import ActorDep, HubDep, Policy, RepoDep, policy
from loractl.hub.hf.addresses import public_base


class RepoBody(msgspec.Struct, kw_only=True):
    """Create or delete a repo; keys that newer clients add are none of our business."""

    name: str
    organization: str | None = None
    type: str | None = None
    visibility: str | None = None
    private: bool | None = None


class MoveBody(msgspec.Struct, kw_only=True):
    """Move a repo."""

    from_repo: str = msgspec.field(name="fromRepo")
    to_repo: str = msgspec.field(name="toRepo")
    type: str | None = None


class SettingsBody(msgspec.Struct, kw_only=True):
    """Change a repo's settings."""

    visibility: str | None = None
    private: bool | None = None
    gated: str | bool | None = None


class CardBody(msgspec.Struct, kw_only=True):
    """A card to be looked at before a push."""

    content: str = ""
    repo_type: str | None = msgspec.field(name="repoType", default=None)


@get("/api/whoami-v2", opt=policy(Policy.TOKEN))
async def whoami(actor: ActorDep) -> dict[str, Any]:
    """Tell a client whose token it sent."""
    writes = bool(actor.roles & {"write", "admin"})
    return {
        "type": "user",
        "id": actor.token_id or "anonymous",
        "name": actor.name,
        "fullname": actor.name,
        "orgs": [],
        "auth": {
            "type": "access_token",
            "accessToken": {"displayName": actor.name, "role": "write" if writes else "read"},
        },
    }


@post("/api/repos/create", opt=policy(Policy.TOKEN), status_code=200)
async def create_repo(
    request: "Request[Any, Any, Any]", data: JSONBody[RepoBody], hub: HubDep, actor: ActorDep
) -> Response[dict[str, Any]]:
    """Make a repo; 409 with the same body when it is there already."""
    _check_type(data.type)
    namespace, name = _names(data, default_namespace=actor.name)
    private = data.private if data.private is not None else data.visibility == "private"
    created = await hub.repos.create(namespace, name, private=private, actor=actor)
    repo = created.repo
    body: dict[str, Any] = {"url": f"{public_base(request, hub)}/{repo.repo_id}", "name": repo.repo_id, "id": repo.key}
    if not created.is_new:
        body["error"] = f"You already created this model repo: {repo.repo_id}"
    return Response(body, status_code=200 if created.is_new else 409)


@delete("/api/repos/delete", opt=policy(Policy.TOKEN), status_code=200)
async def delete_repo(data: JSONBody[RepoBody], hub: HubDep, actor: ActorDep) -> Response[bytes]:
    """Delete a repo with all its versions."""
    _check_type(data.type)
    namespace, name = _names(data, default_namespace=actor.name)
    repo = await hub.repos.find(f"{namespace}/{name}", actor=actor, right="admin")
    await hub.repos.delete(repo, actor=actor)
    return Response(b"", media_type="text/plain", status_code=200)


@post("/api/repos/move", opt=policy(Policy.TOKEN), status_code=200)
async def move_repo(data: JSONBody[MoveBody], hub: HubDep, actor: ActorDep) -> dict[str, Any]:
    """Rename a repo; its old name keeps answering."""
    _check_type(data.type)
    repo = await hub.repos.find(data.from_repo, actor=actor, right="admin")
    namespace, _, name = data.to_repo.partition("/")
    moved = await hub.repos.move(repo, namespace, name, actor=actor)
    return {"id": moved.repo_id}


@put("/api/models/{namespace:str}/{name:str}/settings", opt=policy(Policy.ADMIN))
async def update_settings(data: JSONBody[SettingsBody], hub: HubDep, actor: ActorDep, repo: RepoDep) -> dict[str, Any]:
    """Hide a repo or show it."""
    if data.gated:
        raise BadRequest("this hub has no gated repos", hint="make the repo private", field="gated")
    private = data.private if data.private is not None else data.visibility == "private"
    if data.private is not None or data.visibility is not None:
        await hub.repos.set_private(repo, private=private, actor=actor)
    return {"private": private if data.private is not None or data.visibility is not None else repo.private}


@get("/api/models/{namespace:str}/{name:str}/auth-check", opt=policy(Policy.READ))
async def auth_check(repo: RepoDep) -> dict[str, Any]:
    """Say yes to who may read the repo; everybody else meets the policy."""
    return {"id": repo.repo_id}


@post("/api/validate-yaml", opt=policy(Policy.TOKEN), status_code=200)
async def validate_yaml(data: JSONBody[CardBody]) -> dict[str, Any]:
    """Pass every card on: a broken one becomes a warning in the commit's validation record, with all the others."""
    del data
    return {"errors": [], "warnings": []}


def _names(data: JSONBody[RepoBody], *, default_namespace: str) -> tuple[str, str]:
    if "/" in data.name:
        namespace, _, name = data.name.partition("/")
        return namespace, name
    return data.organization or default_namespace, data.name


def _check_type(kind: str | None) -> None:
    if kind not in {None, "model"}:
        raise BadRequest(f"this hub keeps adapters only, not a {kind}", hint="leave the repo type out", field="type")


ROUTES = [whoami, create_repo, delete_repo, move_repo, update_settings, auth_check, validate_yaml]
