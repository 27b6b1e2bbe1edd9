"""Binds the hub's client to this server's cache: the two blocking calls that `fetch` makes. Knows no asyncio."""

import hashlib
import secrets
from pathlib import Path

import msgspec

from loractl.adapters.local_cache import AdapterCache
from loractl.adapters.reference import AdapterRef
from loractl.hub.client import HubClient
from loractl.hub.client_records import ResolvedAdapter


class HubReader:
    """One hub, read with the server's own token, and the disk cache in front of it."""

    def __init__(self, url: str, *, token: str | None, cache: AdapterCache, resolve_timeout_s: float = 0.8) -> None:
        self.url = url
        self._cache = cache
        # One attempt: the breaker above decides about trying again, and a request must not wait for three.
        self._client = HubClient(url, token, timeout_s=resolve_timeout_s, num_attempts=1)

    def resolve(self, ref: AdapterRef) -> ResolvedAdapter:
        """Ask the hub what a name means, and note it for a start while the hub is away."""
        resolved = self._client.resolve(ref)
        note = self._note(ref)
        encoded = msgspec.json.encode(resolved)
        if not note.is_file() or note.read_bytes() != encoded:
            note.parent.mkdir(parents=True, exist_ok=True)
            staged = note.with_suffix(f".{secrets.token_hex(4)}")
            staged.write_bytes(encoded)
            staged.replace(note)
        return resolved

    def recall(self, ref: AdapterRef) -> ResolvedAdapter | None:
        """What the name meant when this cache last asked; only for adapters that are still in the cache."""
        try:
            resolved = msgspec.json.decode(self._note(ref).read_bytes(), type=ResolvedAdapter)
        except (OSError, msgspec.DecodeError):
            return None
        return resolved if self._cache.get(resolved.digest) is not None else None

    def _note(self, ref: AdapterRef) -> Path:
        name = hashlib.sha256(f"{self.url}\n{ref.repo_id}\n{ref.revision}".encode()).hexdigest()
        return self._cache.root / "names" / f"{name}.json"

    def cached(self, resolved: ResolvedAdapter) -> Path | None:
        return self._cache.get(resolved.digest)

    def fetch(self, resolved: ResolvedAdapter) -> Path:
        return self._client.fetch(resolved, self._cache)

    def close(self) -> None:
        self._client.close()
