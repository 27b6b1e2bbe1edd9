"""Branches (channels) and tags as Hugging Face clients make and delete them. Translates only."""

from typing import Any

import msgspec
from litestar import Response, delete, post
from litestar.params import FromPath, JSONBody

from loractl.hub.access import ActorDep, HubDep, Policy, RepoDep, policy
from loractl.hub.hf.addresses import decoded

_BRANCH = "/api/models/{namespace:str}/{name:str}/branch/{branch:str}"


class BranchBody(msgspec.Struct, kw_only=True):
    """Where a new branch starts."""

    start: str | None = msgspec.field(name="startingPoint", default=None)


class TagBody(msgspec.Struct, kw_only=True):
    """A new tag."""

    tag: str
    message: str | None = None


@post(_BRANCH, opt=policy(Policy.WRITE), status_code=200)
async def create_branch(
    branch: FromPath[str], hub: HubDep, actor: ActorDep, repo: RepoDep, data: JSONBody[BranchBody | None] = None
) -> dict[str, Any]:
    """Make a channel."""
    start = data.start if data is not None else None
    await hub.channels.create_branch(repo, decoded(branch), start=start, actor=actor)
    return {}


@delete(_BRANCH, opt=policy(Policy.WRITE), status_code=200)
async def delete_branch(branch: FromPath[str], hub: HubDep, actor: ActorDep, repo: RepoDep) -> Response[bytes]:
    """Remove a channel."""
    await hub.channels.delete_branch(repo, decoded(branch), actor=actor)
    return Response(b"", media_type="text/plain", status_code=200)


@post("/api/models/{namespace:str}/{name:str}/tag/{revision:str}", opt=policy(Policy.WRITE), status_code=200)
async def create_tag(
    revision: FromPath[str], data: JSONBody[TagBody], hub: HubDep, actor: ActorDep, repo: RepoDep
) -> dict[str, Any]:
    """Name a revision."""
    await hub.channels.create_tag(repo, data.tag, revision=decoded(revision), message=data.message or "", actor=actor)
    return {}


@delete("/api/models/{namespace:str}/{name:str}/tag/{revision:str}", opt=policy(Policy.WRITE), status_code=200)
async def delete_tag(revision: FromPath[str], hub: HubDep, actor: ActorDep, repo: RepoDep) -> Response[bytes]:
    """Remove a tag that a person made."""
    await hub.channels.delete_tag(repo, decoded(revision), actor=actor)
    return Response(b"", media_type="text/plain", status_code=200)


ROUTES = [create_branch, delete_branch, create_tag, delete_tag]
