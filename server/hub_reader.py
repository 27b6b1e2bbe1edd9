"""Binds the hub's client to this server's cache: the two blocking calls that `fetch` makes. Knows no asyncio."""

from pathlib import Path

from loractl.adapters.local_cache import AdapterCache
from loractl.adapters.reference import AdapterRef
from loractl.hub.client import HubClient, ResolvedAdapter


class HubReader:
    """One hub, read with the server's own token, and the disk cache in front of it."""

    def __init__(self, url: str, *, token: str | None, cache: AdapterCache, resolve_timeout_s: float = 0.8) -> None:
        self.url = url
        self._cache = cache
        # One attempt: the breaker above decides about trying again, and a request must not wait for three.
        self._client = HubClient(url, token, timeout_s=resolve_timeout_s, num_attempts=1)

    def resolve(self, ref: AdapterRef) -> ResolvedAdapter:
        return self._client.resolve(ref)

    def fetch(self, resolved: ResolvedAdapter) -> tuple[Path, bool]:
        """Give the verified folder, and whether it was here already."""
        present = self._cache.get(resolved.digest)
        return (present, True) if present is not None else (self._client.fetch(resolved, self._cache), False)

    def close(self) -> None:
        self._client.close()
