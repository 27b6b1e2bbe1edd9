"""Preupload and commit: what a push asks first and says last. Translates only."""

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator
from pathlib import PurePosixPath
from typing import Any, TypeVar

import msgspec
from litestar import Request, Response, post
from litestar.params import FromPath, JSONBody

from loractl.adapters.errors import AdapterInvalid, BadRequest, Conflict, LoractlError, WillNotFit
from loractl.adapters.validation import check_preupload
from loractl.hub.access import ActorDep, HubDep, Policy, RepoDep, policy
from loractl.hub.error_answers import header_text
from loractl.hub.hf.addresses import decoded, is_true, public_base
from loractl.hub.hf.bodies import body_lines
from loractl.hub.registry.commits import Changes
from loractl.hub.registry.records import Repo, TreeEntry
from loractl.hub.registry.tree import git_blob_sha1, lfs_pointer
from loractl.hub.services import Hub

AnyRequest = Request[Any, Any, Any]
T = TypeVar("T")

_MAX_SAMPLE_CHARACTERS = 4096
_MAX_LINES = 4000
# Base64 is a third longer than what it holds; the rest is the line's own words.
_LINE_OVERHEAD_BYTES = 64 << 10


class PreuploadFile(msgspec.Struct):
    """One file that the client is about to send."""

    path: str
    size: int = 0
    sample: str = ""


class PreuploadBody(msgspec.Struct):
    """All of them."""

    files: list[PreuploadFile]
    git_ignore: str | None = msgspec.field(name="gitIgnore", default=None)


class CommitLine(msgspec.Struct):
    """One line of a commit's body."""

    key: str
    value: msgspec.Raw


class HeaderValue(msgspec.Struct):
    summary: str = ""
    description: str = ""
    parent_commit: str | None = msgspec.field(name="parentCommit", default=None)


class FileValue(msgspec.Struct):
    path: str
    content: str
    encoding: str = "base64"


class LfsFileValue(msgspec.Struct):
    path: str
    oid: str
    algo: str = "sha256"
    size: int | None = None


class DeletedValue(msgspec.Struct):
    path: str


@post("/api/models/{namespace:str}/{name:str}/preupload/{revision:str}", opt=policy(Policy.WRITE), status_code=200)
async def preupload(
    request: AnyRequest, data: JSONBody[PreuploadBody], hub: HubDep, repo: RepoDep, revision: FromPath[str]
) -> dict[str, Any]:
    """Say how each file is to be sent, and refuse at once what a commit would refuse later."""
    _refuse_pull_request(request)
    if len(data.files) > hub.settings.max_files_per_repo:
        raise WillNotFit(f"{len(data.files)} files at once are over the limit of {hub.settings.max_files_per_repo}")
    _, tree = await hub.revisions.tree(repo, decoded(revision))
    present = {entry.path: entry for entry in tree}
    _check_files(data.files, hub)
    known = await hub.ledger.known(repo, (entry.sha256 for entry in tree))
    answers: list[dict[str, Any]] = []
    for file in data.files:
        is_large = _goes_by_lfs(file, hub)
        answer = {"path": file.path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
        entry = present.get(file.path)
        if entry is not None and entry.is_lfs == is_large and entry.sha256 in known:
            answer["oid"] = entry.etag
        answers.append(answer)
    # A file of the same size may be the same file; the commit, which knows, asks for room again.
    sizes = {path: entry.size_bytes for path, entry in present.items()}
    new_bytes = sum(file.size for file in data.files if sizes.get(file.path) != file.size)
    await hub.ledger.check_room(repo, new_bytes=new_bytes, used_bytes=await hub.revisions.used_bytes(repo.namespace))
    return {"files": answers, "commitOid": None}


def _check_files(files: list[PreuploadFile], hub: Hub) -> None:
    findings = []
    for file in files:
        try:
            sample = base64.b64decode(file.sample[:_MAX_SAMPLE_CHARACTERS])
        except binascii.Error:
            sample = b""
        findings += check_preupload(file.path, size_bytes=file.size, sample=sample, policy=hub.policy)
    rejections = [finding for finding in findings if finding.level == "reject"]
    if rejections:
        for finding in rejections:
            hub.metrics.validation_failures.labels(reason=finding.code).inc()
        message = "; ".join(f"{finding.code}: {finding.message}" for finding in rejections)
        error = WillNotFit if all(finding.code == "E_SIZE" for finding in rejections) else AdapterInvalid
        raise error(message, hint=rejections[0].hint)


def _goes_by_lfs(file: PreuploadFile, hub: Hub) -> bool:
    # The client sends empty files inside the commit whatever it is told.
    suffix = PurePosixPath(file.path).suffix
    return file.size > 0 and (suffix == ".safetensors" or file.size > hub.settings.max_regular_bytes)


@post(
    "/api/models/{namespace:str}/{name:str}/commit/{revision:str}",
    opt=policy(Policy.WRITE),
    status_code=200,
    request_max_body_size=None,
)
async def commit(
    request: AnyRequest, hub: HubDep, actor: ActorDep, repo: RepoDep, revision: FromPath[str]
) -> Response[dict[str, Any]]:
    """Take a commit: lines of JSON that name what is added and deleted. The same content again changes nothing."""
    _refuse_pull_request(request)
    try:
        changes = await _read_changes(request, hub, repo)
        result = await hub.commits.commit(repo, decoded(revision), changes, actor=actor)
    except LoractlError as error:
        hub.metrics.commits.labels(result=_outcome(error)).inc()
        raise
    hub.metrics.commits.labels(result="ok" if result.record is not None else "unchanged").inc()
    oid = result.commit.oid
    body = {
        "success": True,
        "commitOid": oid,
        "commitUrl": f"{public_base(request, hub)}/{repo.repo_id}/commit/{oid}",
        "hookOutput": "",
        "loractl": {"version": result.commit.version, "digest": result.commit.digest},
    }
    warnings = result.record.warnings if result.record is not None else ()
    text = "; ".join(f"{finding.code}: {finding.message}" for finding in warnings)
    return Response(body, headers={"X-HF-Warning": header_text(f"validation; {text}")} if warnings else {})


def _outcome(error: LoractlError) -> str:
    if isinstance(error, Conflict):
        return "conflict"
    if isinstance(error, AdapterInvalid):
        return "invalid"
    return "quota" if isinstance(error, WillNotFit) else "refused"


async def _read_changes(request: AnyRequest, hub: Hub, repo: Repo) -> Changes:
    """Read the body line by line; small files go to the store as they come."""
    header: HeaderValue | None = None
    files: dict[str, TreeEntry] = {}
    large: dict[str, LfsFileValue] = {}
    deleted_files: list[str] = []
    deleted_folders: list[str] = []
    num_lines = 0
    max_line = hub.settings.max_regular_bytes * 4 // 3 + _LINE_OVERHEAD_BYTES
    async for raw in body_lines(request, max_bytes=hub.settings.max_commit_bytes, max_line_bytes=max_line):
        num_lines += 1
        if num_lines > _MAX_LINES:
            raise WillNotFit(f"a commit of more than {_MAX_LINES} lines")
        line = _decode(raw, CommitLine, num_lines)
        if (header is None) != (line.key == "header"):
            raise BadRequest(f"line {num_lines}: the header comes first, once", field="key")
        match line.key:
            case "header":
                header = _decode(line.value, HeaderValue, num_lines)
            case "file":
                small = _decode(line.value, FileValue, num_lines)
                _check_new(small.path, files, large, num_lines)
                if len(files) >= hub.settings.max_files_per_repo:
                    raise WillNotFit(f"more than {hub.settings.max_files_per_repo} files in one commit")
                files[small.path] = await _keep_small(small, hub, repo, num_lines)
            case "lfsFile":
                lfs = _decode(line.value, LfsFileValue, num_lines)
                _check_new(lfs.path, files, large, num_lines)
                large[lfs.path] = lfs
            case "deletedFile":
                deleted_files.append(_decode(line.value, DeletedValue, num_lines).path)
            case "deletedFolder":
                deleted_folders.append(_decode(line.value, DeletedValue, num_lines).path)
            case _:
                raise BadRequest(f"line {num_lines}: unknown key {line.key[:40]!r}", field="key")
    if header is None:
        raise BadRequest("a commit begins with a line of key header", field="key")
    both = set(deleted_files) & (files.keys() | large.keys())
    if both:
        raise BadRequest(f"{min(both)} is both added and deleted", field="path")
    entries = [*files.values(), *await _large_entries(large, hub, repo)]
    return Changes(
        title=header.summary[:1000],
        message=header.description[:20_000],
        expected_parent=header.parent_commit or None,
        files=tuple(entries),
        deleted_files=tuple(deleted_files),
        deleted_folders=tuple(deleted_folders),
    )


def _check_new(path: str, files: dict[str, TreeEntry], large: dict[str, LfsFileValue], number: int) -> None:
    if path in files or path in large:
        raise BadRequest(f"line {number}: {path!r} comes twice", field="path")


async def _keep_small(value: FileValue, hub: Hub, repo: Repo, number: int) -> TreeEntry:
    if value.encoding != "base64":
        raise BadRequest(f"line {number}: unknown encoding {value.encoding[:40]!r}", field="encoding")
    try:
        data = await asyncio.to_thread(base64.b64decode, value.content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"line {number}: the content of {value.path!r} is not base64", field="content") from error
    if len(data) > hub.settings.max_regular_bytes:
        raise WillNotFit(
            f"{value.path}: files over {hub.settings.max_regular_bytes:,} bytes are sent outside the commit"
        )

    async def once() -> AsyncIterator[bytes]:
        yield data

    stored = await hub.ledger.keep(repo, once(), size_bytes=len(data))
    hub.metrics.upload_bytes.inc(len(data))
    return TreeEntry(value.path, stored.sha256, git_blob_sha1(data), len(data), is_lfs=False)


async def _large_entries(large: dict[str, LfsFileValue], hub: Hub, repo: Repo) -> list[TreeEntry]:
    known = await hub.ledger.known(repo, (value.oid for value in large.values()))
    entries: list[TreeEntry] = []
    for path, value in large.items():
        if value.algo != "sha256" or value.oid not in known or value.size not in {None, known[value.oid]}:
            raise BadRequest(
                f"{path}: its content ({value.algo[:20]} {value.oid[:64]}) was not uploaded to this repo",
                hint="upload it first; the upload may also have expired",
            )
        size = known[value.oid]
        entries.append(TreeEntry(path, value.oid, git_blob_sha1(lfs_pointer(value.oid, size)), size, is_lfs=True))
    return entries


def _decode(data: bytes | msgspec.Raw, kind: type[T], number: int) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"line {number}: {error}") from error


def _refuse_pull_request(request: AnyRequest) -> None:
    if is_true(request.query_params.get("create_pr")):
        raise BadRequest(
            "this hub has no pull requests", hint="push to a channel and have it promoted", field="create_pr"
        )


ROUTES = [preupload, commit]
