"""Git LFS: offers of upload addresses, the uploads themselves, whole or in parts, and their check. Translates only."""

import math
import re
import time
from typing import Any
from urllib.parse import urlencode

import msgspec
from litestar import Request, Response, post, put
from litestar.params import FromPath, FromQuery, JSONBody

from loractl.adapters.errors import BadRequest, NotFound, WillNotFit
from loractl.hub.access import ActorDep, HubDep, Policy, RepoDep, policy
from loractl.hub.actor import Actor
from loractl.hub.hf.addresses import public_base
from loractl.hub.hf.bodies import body_chunks
from loractl.hub.registry.records import Repo
from loractl.hub.services import Hub

AnyRequest = Request[Any, Any, Any]

_OID = re.compile(r"[0-9a-f]{64}")
_MEDIA_TYPE = "application/vnd.git-lfs+json"


class LfsObject(msgspec.Struct):
    """A file by content."""

    oid: str
    size: int


class BatchBody(msgspec.Struct):
    """What the client wants to upload."""

    objects: list[LfsObject]
    operation: str = "upload"
    transfers: list[str] = []
    hash_algo: str = "sha256"


class Part(msgspec.Struct):
    part_number: int = msgspec.field(name="partNumber")
    etag: str = ""


class CompleteBody(msgspec.Struct):
    """The parts that were sent."""

    oid: str
    parts: list[Part]


@post("/{namespace:str}/{name:str}/info/lfs/objects/batch", opt=policy(Policy.WRITE), status_code=200)
async def batch(
    request: AnyRequest, data: JSONBody[BatchBody], hub: HubDep, actor: ActorDep, repo: RepoDep
) -> Response[Any]:
    """Offer an address for each object that this repo does not have yet."""
    if data.operation != "upload" or data.hash_algo != "sha256":
        raise BadRequest("only uploads of sha256 objects are offered here", hint="download by `resolve`")
    if len(data.objects) > hub.settings.max_files_per_repo:
        raise WillNotFit(f"{len(data.objects)} objects at once are over the limit")
    for item in data.objects:
        if not _OID.fullmatch(item.oid) or item.size < 0:
            raise BadRequest("an oid is 64 hex digits and a size is not negative", field="objects")
    known = await hub.ledger.known(repo, (item.oid for item in data.objects))
    new_bytes = sum(item.size for item in data.objects if item.oid not in known)
    hub.metrics.blob_dedup_bytes.inc(sum(known.values()))
    used_bytes = await hub.revisions.used_bytes(repo.namespace)
    base = public_base(request, hub)
    multipart = "multipart" in data.transfers and any(
        item.size > hub.settings.multipart_threshold_bytes and item.oid not in known for item in data.objects
    )
    objects: list[dict[str, Any]] = []
    for item in data.objects:
        answer: dict[str, Any] = {"oid": item.oid, "size": item.size}
        if item.oid not in known:
            try:
                _check_size(item, hub)
                await hub.ledger.check_room(repo, new_bytes=new_bytes, used_bytes=used_bytes)
                answer["actions"] = await _actions(base, hub, repo, item, actor=actor, multipart=multipart)
            except WillNotFit as error:
                answer["error"] = {"code": error.status, "message": error.message}
        objects.append(answer)
    body = {"transfer": "multipart" if multipart else "basic", "objects": objects}
    return Response(msgspec.json.encode(body), media_type=_MEDIA_TYPE)


def _check_size(item: LfsObject, hub: Hub) -> None:
    if item.size > hub.settings.max_file_bytes:
        raise WillNotFit(f"{item.size:,} bytes are over the limit of {hub.settings.max_file_bytes:,} for one file")


async def _actions(
    base: str, hub: Hub, repo: Repo, item: LfsObject, *, actor: Actor, multipart: bool
) -> dict[str, Any]:
    expires_at = time.time() + hub.settings.upload_ttl_s
    verify = {"href": f"{base}/{repo.repo_id}.git/info/lfs/objects/verify"}
    chunk = hub.settings.multipart_chunk_bytes
    if not multipart or item.size <= chunk:
        signature = hub.signer.sign("object", repo.key, item.oid, item.size, expires_at=expires_at)
        query = urlencode({"size": item.size, "signature": signature})
        return {"upload": {"href": f"{base}/lfs/{repo.key}/objects/{item.oid}?{query}"}, "verify": verify}
    session = await hub.uploads.open_session(repo, "multipart", actor=actor)
    num_parts = math.ceil(item.size / chunk)
    header = {"chunk_size": str(chunk)}
    for number in range(1, num_parts + 1):
        num_bytes = min(chunk, item.size - (number - 1) * chunk)
        signature = hub.signer.sign("part", session, number, num_bytes, expires_at=expires_at)
        query = urlencode({"size": num_bytes, "signature": signature})
        header[f"{number:05d}"] = f"{base}/lfs/sessions/{session}/parts/{number}?{query}"
    signature = hub.signer.sign("complete", repo.key, session, item.oid, item.size, num_parts, expires_at=expires_at)
    query = urlencode({"size": item.size, "parts": num_parts, "repo_key": repo.key, "signature": signature})
    href = f"{base}/lfs/sessions/{session}/complete/{item.oid}?{query}"
    return {"upload": {"href": href, "header": header}, "verify": verify}


@put("/lfs/{repo_key:int}/objects/{oid:str}", opt=policy(Policy.SIGNED), status_code=200, request_max_body_size=None)
async def put_object(
    *,
    request: AnyRequest,
    hub: HubDep,
    repo_key: FromPath[int],
    oid: FromPath[str],
    size: FromQuery[int],
    signature: FromQuery[str],
) -> Response[bytes]:
    """Take a whole object; the address says which, how large, for which repo and until when."""
    hub.signer.check(signature, "object", repo_key, oid, size)
    repo = await hub.repos.by_key(repo_key)
    with hub.metrics.upload():
        await hub.ledger.keep(repo, body_chunks(request, max_bytes=size), sha256=oid, size_bytes=size)
    hub.metrics.upload_bytes.inc(size)
    return Response(b"", media_type="text/plain", headers={"ETag": f'"{oid}"'})


@put(
    "/lfs/sessions/{session:str}/parts/{number:int}",
    opt=policy(Policy.SIGNED),
    status_code=200,
    request_max_body_size=None,
)
async def put_part(
    *,
    request: AnyRequest,
    hub: HubDep,
    session: FromPath[str],
    number: FromPath[int],
    size: FromQuery[int],
    signature: FromQuery[str],
) -> Response[bytes]:
    """Take one part of an object; sending it again replaces it."""
    hub.signer.check(signature, "part", session, number, size)
    await hub.uploads.session_repo(session, "multipart")
    with hub.metrics.upload():
        num_bytes = await hub.uploads.stage_part(
            session, f"{number:05d}", body_chunks(request, max_bytes=size), max_bytes=size
        )
    if num_bytes != size:
        raise BadRequest(f"part {number} has {num_bytes} bytes where {size} were announced", hint="send it again")
    hub.metrics.upload_bytes.inc(size)
    return Response(b"", media_type="text/plain", headers={"ETag": f'"{number}-{size}"'})


@post("/lfs/sessions/{session:str}/complete/{oid:str}", opt=policy(Policy.SIGNED), status_code=200)
async def complete(
    *,
    data: JSONBody[CompleteBody],
    hub: HubDep,
    session: FromPath[str],
    oid: FromPath[str],
    size: FromQuery[int],
    parts: FromQuery[int],
    repo_key: FromQuery[int],
    signature: FromQuery[str],
) -> dict[str, Any]:
    """Join the parts, once all are there; asked again after success it says yes again."""
    hub.signer.check(signature, "complete", repo_key, session, oid, size, parts)
    if data.oid != oid or sorted(part.part_number for part in data.parts) != list(range(1, parts + 1)):
        raise BadRequest(f"the parts 1 to {parts} of {oid} are needed, each once", field="parts")
    try:
        repo = await hub.uploads.session_repo(session, "multipart")
    except NotFound:
        known = await hub.ledger.known(await hub.repos.by_key(repo_key), [oid])
        if known.get(oid) != size:
            raise
        return {"oid": oid, "size": size}
    await hub.uploads.join_parts(repo, session, parts, sha256=oid, size_bytes=size)
    return {"oid": oid, "size": size}


@post("/{namespace:str}/{name:str}/info/lfs/objects/verify", opt=policy(Policy.WRITE), status_code=200)
async def verify(data: JSONBody[LfsObject], hub: HubDep, repo: RepoDep) -> dict[str, Any]:
    """Say whether an object has arrived whole; its hash was compared while it was written."""
    known = await hub.ledger.known(repo, [data.oid])
    if known.get(data.oid) != data.size:
        raise NotFound(f"object {data.oid[:64]} of {data.size} bytes has not arrived", hint="upload it again")
    return {"oid": data.oid, "size": data.size}


ROUTES = [batch, put_object, put_part, complete, verify]
