"""A hub in memory for tests of the server: what a name means, whether it is away, and what it was asked."""

import time
from pathlib import Path
from typing import Any

from loractl.adapters.errors import RepoNotFound, Unreachable
from loractl.adapters.reference import AdapterRef, Digest
from loractl.hub.client_records import ResolvedAdapter

BASE = "sha256:" + "b" * 64


def digest_of(digit: str) -> Digest:
    """The digest that is this digit 64 times."""
    return Digest("sha256:" + digit * 64)


def resolved(ref: AdapterRef, digest: Digest, **changes: Any) -> ResolvedAdapter:
    """What a hub answers for a name of an adapter without a pinned base."""
    settings: dict[str, Any] = {
        "repo_id": ref.repo_id,
        "revision": ref.revision,
        "commit": "c" * 40,
        "digest": digest,
        "version": None,
        "base_id": None,
        "base_fingerprint": None,
        "rank": 4,
        "size_bytes": 1,
    }
    return ResolvedAdapter(**(settings | changes))


class FakeHub:
    """Repos by name with the digit of their digest; a fetched adapter is an empty folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.digits: dict[str, str] = {"team/a": "1", "team/b": "2"}
        self.fingerprint: str | None = BASE
        self.is_down = False
        self.delay_s = 0.0
        self.fetch_s = 0.02
        self.remembered: ResolvedAdapter | None = None
        self.resolves: list[AdapterRef] = []
        self.fetches: list[Digest] = []

    def resolve(self, ref: AdapterRef) -> ResolvedAdapter:
        self.resolves.append(ref)
        time.sleep(self.delay_s)
        if self.is_down:
            raise Unreachable("the hub is away")
        if ref.repo_id not in self.digits:
            raise RepoNotFound(f"no {ref}")
        return resolved(ref, digest_of(self.digits[ref.repo_id]), version="v1", base_fingerprint=self.fingerprint)

    def recall(self, ref: AdapterRef) -> ResolvedAdapter | None:
        del ref
        return self.remembered

    def cached(self, resolved: ResolvedAdapter) -> Path | None:
        folder = self.folder / resolved.digest[7:]
        return folder if folder.is_dir() else None

    def fetch(self, resolved: ResolvedAdapter) -> Path:
        if self.is_down:
            raise Unreachable("the hub is away")
        self.fetches.append(resolved.digest)
        time.sleep(self.fetch_s)
        folder = self.folder / resolved.digest[7:]
        folder.mkdir(exist_ok=True)
        return folder
