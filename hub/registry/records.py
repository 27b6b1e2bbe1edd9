"""What the rules hand to each other and to the routes. Knows rows, no queries."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import msgspec
from sqlalchemy import Row

RefKind = Literal["branch", "tag", "version"]

EMPTY_COMMIT_TITLE = "initial commit"


@dataclass(frozen=True, slots=True)
class Repo:
    """One repo; `key` is the database's."""

    key: int
    namespace: str
    name: str
    private: bool
    created_at: float
    updated_at: float
    num_downloads: int
    next_version: int

    @property
    def repo_id(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Commit:
    """One immutable state of a repo and the facts of the adapter in its root."""

    oid: str
    repo: int
    parent: str | None
    title: str
    message: str
    author: str
    created_at: float
    tree_sha256: str
    num_files: int
    size_bytes: int
    version: str | None
    digest: str | None
    adapter_size_bytes: int
    base_id: str | None
    base_fingerprint: str | None
    task: str | None
    rank: int | None
    metrics: dict[str, float]
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunningCanary:
    """The commit that a share of a channel's callers gets, and who wanted that."""

    channel: str
    commit: Commit
    share: float
    by: str
    at: float
    reason: str


@dataclass(frozen=True, slots=True)
class TreeEntry:
    """One file of a commit."""

    path: str
    sha256: str
    git_sha1: str
    size_bytes: int
    is_lfs: bool

    @property
    def etag(self) -> str:
        """What clients compare content by: sha256 of large files, git's hash of small ones."""
        return self.sha256 if self.is_lfs else self.git_sha1


@dataclass(frozen=True, slots=True)
class Ref:
    """A channel (kind branch) or a tag, and where it points."""

    name: str
    kind: RefKind
    commit_oid: str
    protected: bool
    updated_at: float


def repo_of(row: "Row[Any]") -> Repo:
    return Repo(
        key=row.id,
        namespace=row.namespace,
        name=row.name,
        private=row.private,
        created_at=row.created_at,
        updated_at=row.updated_at,
        num_downloads=row.num_downloads,
        next_version=row.next_version,
    )


def commit_of(row: "Row[Any]") -> Commit:
    values = {name: getattr(row, name) for name in Commit.__slots__ if name not in {"metrics", "tags"}}
    return Commit(
        **values,
        metrics=msgspec.json.decode(row.metrics, type=dict[str, float]),
        tags=msgspec.json.decode(row.tags, type=tuple[str, ...]),
    )


def entry_of(row: "Row[Any]") -> TreeEntry:
    return TreeEntry(row.path, row.sha256, row.git_sha1, row.size_bytes, row.is_lfs)


def ref_of(row: "Row[Any]") -> Ref:
    return Ref(row.name, row.kind, row.commit_oid, row.protected, row.updated_at)


class UpkeepKind(StrEnum):
    """The works that are noted."""

    GC = "gc"
    SCRUB = "scrub"
    """A fsck that read every byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpkeepTotals:
    """All runs of one kind together; `last_success_at` is a unix time, 0 for never."""

    num_succeeded: int = 0
    num_failed: int = 0
    num_blobs: int = 0
    """That gc removed, that a scrub looked at."""
    num_corrupt: int = 0
    num_missing: int = 0
    last_success_at: float = 0.0
