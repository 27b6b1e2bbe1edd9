"""The registry's records in the words of the Hugging Face API. Pure."""

from typing import Any

from loractl.hub.moments import iso
from loractl.hub.registry.records import Commit, Repo, TreeEntry
from loractl.hub.registry.tree import lfs_pointer


def model_view(repo: Repo, commit: Commit) -> dict[str, Any]:
    """What `model_info` and `list_models` show; clients keep unknown keys, so ours ride along."""
    return {
        "_id": f"{repo.key:024x}",
        "id": repo.repo_id,
        "modelId": repo.repo_id,
        "author": repo.namespace,
        "sha": commit.oid,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "lastModified": iso(repo.updated_at),
        "createdAt": iso(repo.created_at),
        "tags": list(commit.tags),
        "library_name": "peft",
        "pipeline_tag": "text-generation" if commit.task == "CAUSAL_LM" else None,
        "cardData": {"base_model": commit.base_id} if commit.base_id else {},
        "downloads": repo.num_downloads,
        "likes": 0,
        "loractl": {
            "version": commit.version,
            "digest": commit.digest,
            "base_fingerprint": commit.base_fingerprint,
            "rank": commit.rank,
        },
    }


def siblings_view(tree: list[TreeEntry], *, with_blobs: bool) -> list[dict[str, Any]]:
    """The flat list of files inside `model_info`."""
    if not with_blobs:
        return [{"rfilename": entry.path} for entry in tree]
    return [
        {"rfilename": entry.path, "size": entry.size_bytes, "blobId": entry.git_sha1}
        | ({"lfs": lfs_view(entry, name="sha256")} if entry.is_lfs else {})
        for entry in tree
    ]


def lfs_view(entry: TreeEntry, *, name: str) -> dict[str, Any]:
    return {
        name: entry.sha256,
        "size": entry.size_bytes,
        "pointerSize": len(lfs_pointer(entry.sha256, entry.size_bytes)),
    }


def file_view(entry: TreeEntry, *, commit: Commit | None) -> dict[str, Any]:
    """One file of a tree; `commit` is given when the client asked to expand."""
    view: dict[str, Any] = {"type": "file", "oid": entry.git_sha1, "size": entry.size_bytes, "path": entry.path}
    if entry.is_lfs:
        view["lfs"] = lfs_view(entry, name="oid")
    return view | _expanded(commit)


def folder_view(path: str, *, commit: Commit | None) -> dict[str, Any]:
    return {"type": "directory", "oid": "0" * 40, "size": 0, "path": path} | _expanded(commit)


def _expanded(commit: Commit | None) -> dict[str, Any]:
    if commit is None:
        return {}
    return {
        "lastCommit": {"id": commit.oid, "title": commit.title, "date": iso(commit.created_at)},
        "securityFileStatus": {"status": "safe", "avScan": None, "pickleImportScan": None},
    }


def commit_view(commit: Commit) -> dict[str, Any]:
    return {
        "id": commit.oid,
        "title": commit.title,
        "message": commit.message,
        "date": iso(commit.created_at),
        "authors": [{"user": commit.author}],
    }


def children(tree: list[TreeEntry], folder: str, *, recursive: bool) -> tuple[list[str], list[TreeEntry]]:
    """Folders and files below a folder ("" is the root); both empty when there is no such folder."""
    prefix = f"{folder}/" if folder else ""
    inside = [entry for entry in tree if entry.path.startswith(prefix)]
    folders: dict[str, None] = {}
    files: list[TreeEntry] = []
    for entry in inside:
        parts = entry.path[len(prefix) :].split("/")
        depths = range(1, len(parts)) if recursive else range(1, min(2, len(parts)))
        folders |= dict.fromkeys(prefix + "/".join(parts[:depth]) for depth in depths)
        if recursive or len(parts) == 1:
            files.append(entry)
    return list(folders), files
