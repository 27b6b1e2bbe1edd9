"""`resolve`: one file of one revision, whole or in part. Translates only."""

import mimetypes
from typing import Any

from litestar import Request, route
from litestar.enums import HttpMethod
from litestar.params import FromPath
from litestar.types import ASGIApp

from loractl.hub.access import HubDep, Policy, RepoDep, policy
from loractl.hub.blobs.store import checked_blocks
from loractl.hub.error_answers import header_text
from loractl.hub.hf.addresses import decoded, decoded_path
from loractl.hub.hf.file_answer import ByteRange, FileAnswer, read_range, started
from loractl.hub.hf.read_routes import yank_warning
from loractl.hub.registry.revisions import FoundFile, MissingFile


@route(
    "/{namespace:str}/{name:str}/resolve/{revision:str}/{path:path}",
    http_method=[HttpMethod.GET, HttpMethod.HEAD],
    opt=policy(Policy.READ),
    status_code=200,
)
async def resolve_file(
    request: "Request[Any, Any, Any]", hub: HubDep, repo: RepoDep, revision: FromPath[str], path: FromPath[str]
) -> ASGIApp:
    """Send a file, or with HEAD tell of it; `Range` is honoured."""
    found = await hub.revisions.file(repo, decoded(revision), decoded_path(path))
    if isinstance(found, MissingFile):
        return _missing(found, f"{repo.repo_id}@{decoded(revision)} has no file {decoded_path(path)!r}")
    headers = _headers(found)
    size = found.entry.size_bytes
    if request.headers.get("if-none-match") == headers["ETag"]:
        return FileAnswer(status=304, headers=headers, body=None)
    span = read_range(request.headers.get("range"), size)
    if span is not None and span.start == span.stop:
        headers |= {"Content-Range": f"bytes */{size}", "Content-Length": "0"}
        return FileAnswer(status=416, headers=headers, body=None)
    if span is not None:
        headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{size}"
    whole = span or ByteRange(0, size)
    headers["Content-Length"] = str(whole.stop - whole.start)
    status = 200 if span is None else 206
    if request.method == "HEAD":
        return FileAnswer(status=status, headers=headers, body=None)
    body = checked_blocks(hub.store, found.blob, start=whole.start, stop=whole.stop)
    counts = request.headers.get("x-hf-download-counter") == "1" or found.entry.path.endswith(".safetensors")

    async def when_done(num_bytes: int) -> None:
        hub.metrics.download_bytes.labels(backend=hub.store.name).inc(num_bytes)
        if counts and whole.start == 0:
            await hub.repos.count_download(repo)

    return FileAnswer(status=status, headers=headers, body=await started(body), when_done=when_done)


def _headers(found: FoundFile) -> dict[str, str]:
    entry = found.entry
    headers = {
        "X-Repo-Commit": found.commit.oid,
        "ETag": f'"{entry.etag}"',
        "Accept-Ranges": "bytes",
        "Content-Type": mimetypes.guess_type(entry.path)[0] or "application/octet-stream",
        # What people push is never a page of the hub's.
        "Content-Security-Policy": "sandbox; default-src 'none'",
        "X-Content-Type-Options": "nosniff",
        "Content-Disposition": "attachment",
    }
    if entry.is_lfs:
        headers |= {"X-Linked-ETag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size_bytes)}
    if found.yanked is not None:
        headers["X-HF-Warning"] = yank_warning(found.yanked)
    return headers


def _missing(found: MissingFile, message: str) -> ASGIApp:
    return FileAnswer(
        status=404,
        headers={
            "X-Error-Code": "EntryNotFound",
            "X-Error-Message": header_text(message),
            # Clients remember by the commit that the file is not there.
            "X-Repo-Commit": found.commit.oid,
            "Content-Length": "0",
        },
        body=None,
    )


ROUTES = [resolve_file]
