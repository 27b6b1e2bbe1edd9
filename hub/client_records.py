"""What the hub's client gives back: an adapter made exact, and what a push made. Sends nothing."""

from dataclasses import dataclass

from loractl.adapters.reference import Digest
from loractl.hub.wire import Resolved


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedAdapter:
    """One adapter made exact: what to fetch, and what it must hash to."""

    repo_id: str
    revision: str
    commit: str
    digest: Digest
    version: str | None
    base_id: str | None
    base_fingerprint: str | None
    rank: int | None
    size_bytes: int
    yanked: str | None = None
    canary: "ResolvedCanary | None" = None
    """Set where the revision is a channel of which a share of callers gets another version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedCanary:
    """The version that a share of a channel's callers gets."""

    share: float
    adapter: ResolvedAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What a push made; `created` is False when the hub had this very content already."""

    repo_id: str
    version: str | None
    commit: str
    digest: Digest
    created: bool


def resolved_adapter(found: Resolved, digest: str) -> ResolvedAdapter:
    """The hub's own answer, whose commit holds an adapter of this digest."""
    return ResolvedAdapter(
        repo_id=found.repo_id,
        revision=found.revision,
        commit=found.commit,
        digest=Digest(digest),
        version=found.version,
        base_id=found.base_id,
        base_fingerprint=found.base_fingerprint,
        rank=found.rank,
        size_bytes=found.size_bytes,
        yanked=found.yanked,
        canary=_canary(found),
    )


def _canary(found: Resolved) -> ResolvedCanary | None:
    canary = found.canary
    if canary is None or canary.digest is None:
        return None
    adapter = ResolvedAdapter(
        repo_id=found.repo_id,
        revision=found.revision,
        commit=canary.commit,
        digest=Digest(canary.digest),
        version=canary.version,
        base_id=canary.base_id,
        base_fingerprint=canary.base_fingerprint,
        rank=canary.rank,
        size_bytes=canary.size_bytes,
    )
    return ResolvedCanary(share=canary.share, adapter=adapter)
