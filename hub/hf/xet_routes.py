"""The Xet upload path of current clients, write-only and within one session. Translates only.

Every session has a random address, so no client believes that this hub still has what it sent last time; all other
routes of a Xet store answer 404, which sends clients the way that is here.
"""

import time
from typing import Any

from litestar import Request, Response, get, post
from litestar.params import FromPath

from loractl.adapters.errors import BadRequest, NotAllowed
from loractl.hub.access import ActorDep, HubDep, Policy, RepoDep, bearer, policy
from loractl.hub.hf.addresses import decoded, is_true, public_base
from loractl.hub.hf.bodies import body_chunks, whole_body
from loractl.hub.registry.records import Repo
from loractl.hub.registry.xet_uploads import XET_HASH
from loractl.hub.services import Hub
from loractl.hub.xet_format import MAX_SHARD_BYTES, MAX_XORB_BYTES

AnyRequest = Request[Any, Any, Any]

_KIND = "xet"


@get("/api/models/{namespace:str}/{name:str}/xet-write-token/{revision:str}", opt=policy(Policy.WRITE))
async def write_token(
    request: AnyRequest, hub: HubDep, actor: ActorDep, repo: RepoDep, revision: FromPath[str]
) -> Response[dict[str, Any]]:
    """Open an upload session and hand out its address and token."""
    if is_true(request.query_params.get("create_pr")):
        raise BadRequest("this hub has no pull requests", field="create_pr")
    await hub.revisions.commit(repo, decoded(revision))
    session = await hub.uploads.open_session(repo, _KIND, actor=actor)
    expires_at = int(time.time() + hub.settings.upload_ttl_s)
    token = hub.signer.sign(_KIND, repo.key, expires_at=expires_at)
    address = f"{public_base(request, hub)}/xet/{session}"
    headers = {
        "X-Xet-Cas-Url": address,
        "X-Xet-Access-Token": token,
        "X-Xet-Token-Expiration": str(expires_at),
    }
    return Response({"casUrl": address, "accessToken": token, "exp": expires_at}, headers=headers)


@post(
    "/xet/{session:str}/v1/xorbs/default/{xorb:str}",
    opt=policy(Policy.SIGNED),
    status_code=200,
    request_max_body_size=None,
)
async def put_xorb(request: AnyRequest, hub: HubDep, session: FromPath[str], xorb: FromPath[str]) -> dict[str, Any]:
    """Take one pack of chunks."""
    await _session_repo(request, hub, session)
    if not XET_HASH.fullmatch(xorb):
        raise BadRequest("a xorb is named by 64 hex digits")
    with hub.metrics.upload():
        num_bytes = await hub.uploads.stage_part(
            session, xorb, body_chunks(request, max_bytes=MAX_XORB_BYTES), max_bytes=MAX_XORB_BYTES
        )
    await hub.xet.check_xorb(session, xorb)
    hub.metrics.upload_bytes.inc(num_bytes)
    return {"was_inserted": True}


@post("/xet/{session:str}/v1/shards", opt=policy(Policy.SIGNED), status_code=200, request_max_body_size=None)
async def put_shard(request: AnyRequest, hub: HubDep, session: FromPath[str]) -> dict[str, Any]:
    """Make the files that a shard describes out of the session's packs."""
    repo = await _session_repo(request, hub, session)
    await hub.xet.take_shard(repo, session, await whole_body(request, max_bytes=MAX_SHARD_BYTES))
    return {"result": 1}


async def _session_repo(request: AnyRequest, hub: Hub, session: str) -> Repo:
    """The repo of a session, for who holds a token for it; a refreshed token is as good as the first one."""
    token = bearer(request)
    if token is None:
        raise NotAllowed("a Xet session needs its token")
    repo = await hub.uploads.session_repo(session, _KIND)
    hub.signer.check(token, _KIND, repo.key)
    return repo


ROUTES = [write_token, put_xorb, put_shard]
