"""The names of trees and commits: hashes over what they hold, so that equal content has equal names. Pure."""

import hashlib
from collections.abc import Iterable

import msgspec

from loractl.hub.registry.records import TreeEntry


def tree_sha256(entries: Iterable[TreeEntry]) -> str:
    """Hash paths and contents, whatever order they come in."""
    content = sorted((entry.path, entry.sha256) for entry in entries)
    return hashlib.sha256(msgspec.json.encode(content)).hexdigest()


def commit_oid(
    *, repo: int, parent: str | None, tree: str, title: str, message: str, author: str, created_at: float
) -> str:
    """Name a commit by 40 hex digits, as clients expect; it is not git's object id, since nobody clones."""
    content = ["loractl-commit-v1", repo, parent, tree, title, message, author, created_at]
    return hashlib.sha1(msgspec.json.encode(content), usedforsecurity=False).hexdigest()


def lfs_pointer(sha256: str, size_bytes: int) -> bytes:
    """The text file that git would keep in place of a large one."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size_bytes}\n".encode()


def git_blob_sha1(data: bytes) -> str:
    """Hash small content as git does."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
