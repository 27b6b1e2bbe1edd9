"""Small words for the checks: what an error said, what a push on the wire looks like."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import httpx


def status_of(error: BaseException) -> int:
    """The status behind a client's exception, whichever HTTP library the client uses."""
    status: int = error.response.status_code  # type: ignore[attr-defined]
    return status


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".cache" not in path.parts
    }


def header_line(**more: Any) -> str:
    return json.dumps({"key": "header", "value": {"summary": "by hand", "description": ""} | more}) + "\n"


def file_line(path: str, data: bytes) -> str:
    value = {"path": path, "content": base64.b64encode(data).decode(), "encoding": "base64"}
    return json.dumps({"key": "file", "value": value}) + "\n"


def lfs_line(path: str, oid: str, **more: Any) -> str:
    return json.dumps({"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": oid} | more}) + "\n"


def send_commit(http: httpx.Client, repo: str, *lines: str, revision: str = "main") -> httpx.Response:
    return http.post(
        f"/api/models/{repo}/commit/{revision}",
        content="".join(lines).encode(),
        headers={"Content-Type": "application/x-ndjson"},
    )


def offer(http: httpx.Client, repo: str, data: bytes, **more: Any) -> dict[str, Any]:
    """Ask for the address of an upload; the object of the answer."""
    body = {
        "operation": "upload",
        "transfers": ["basic", "multipart"],
        "objects": [{"oid": sha256(data), "size": len(data)} | more],
        "hash_algo": "sha256",
    }
    answer = http.post(
        f"/{repo}.git/info/lfs/objects/batch", json=body, headers={"Accept": "application/vnd.git-lfs+json"}
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("application/vnd.git-lfs+json")
    found: dict[str, Any] = answer.json()["objects"][0]
    return found


def commits_of(http: httpx.Client, repo: str, revision: str = "main") -> list[str]:
    return [one["id"] for one in http.get(f"/api/models/{repo}/commits/{revision}").json()]
