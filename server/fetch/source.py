"""The way from a name to an adapter's files: the folders given at the start, then the hub."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loractl.adapters.errors import BaseMismatch, LoractlError, RepoNotFound, UsageError
from loractl.adapters.reference import AdapterRef, Digest, parse_reference
from loractl.hub.client_records import ResolvedAdapter
from loractl.server.fetch.canary import Track, is_chosen
from loractl.server.fetch.from_hub import FromHub

_log = logging.getLogger("loractl.server")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An adapter ready to be used: its name as it was asked for, its identity, its files."""

    name: str
    digest: Digest
    folder: Path
    repo_id: str | None = None
    revision: str | None = None
    from_disk: bool = True
    """False when this very request had to wait for the download."""
    version: str | None = None
    """The hub's immutable tag of it, such as `v3`."""
    track: Track | None = None
    """Which side of its channel's canary this is; None while there is none."""


class AdapterSource:
    """Finds adapters by name: the folders given at the start, then the hub, if there is one."""

    def __init__(self, *, local: Mapping[str, Found], hub: FromHub | None, base_fingerprint: str) -> None:
        self.local = dict(local)
        self.hub = hub
        self._base_fingerprint = base_fingerprint

    @property
    def hub_is_up(self) -> bool | None:
        """None without a hub."""
        return None if self.hub is None else self.hub.calls.breaker.is_closed

    def known_names(self) -> list[tuple[str, ResolvedAdapter]]:
        """The hub's names that have been resolved lately, with what they meant."""
        return [] if self.hub is None else self.hub.names.known()

    async def close(self) -> None:
        if self.hub is not None:
            await self.hub.close()

    async def find(self, name: str, *, caller: str | None = None) -> Found:
        """Give the adapter for a name. Raises NotFound (no such), BaseMismatch, Unreachable (hub down, not cached).

        Where the name is a channel with a canary, the `caller` decides who gets it; None never does.
        """
        if name in self.local:
            return self.local[name]
        if self.hub is None:
            raise RepoNotFound(
                f"no model {name[:200]!r} here", hint="GET /v1/models lists what is served", field="model"
            )
        ref = _parse(name)
        resolved = await self.hub.names.resolve(ref)
        canary = resolved.canary
        if canary is None:
            return await self._found(self.hub, name, resolved, track=None)
        if caller is not None and is_chosen(caller, canary):
            try:
                return await self._found(self.hub, name, canary.adapter, track="canary")
            except LoractlError as error:
                # Whoever would try the new version must not be worse off than with the old one.
                _log.warning("the canary of %s cannot be had (%s): its callers get the channel's own", ref, error.code)
        return await self._found(self.hub, name, resolved, track="stable")

    async def _found(self, hub: FromHub, name: str, resolved: ResolvedAdapter, *, track: Track | None) -> Found:
        if resolved.base_fingerprint is not None and resolved.base_fingerprint != self._base_fingerprint:
            raise BaseMismatch(
                f"adapter {name} belongs to another base than this server's",
                hint=f"it was made for {resolved.base_fingerprint[:19]}, this base is {self._base_fingerprint[:19]}",
                field="model",
            )
        folder, was_on_disk = await hub.folder_of(resolved)
        return Found(
            name=name,
            digest=resolved.digest,
            folder=folder,
            repo_id=resolved.repo_id,
            revision=resolved.revision,
            from_disk=was_on_disk,
            version=resolved.version,
            track=track,
        )


def _parse(name: str) -> AdapterRef:
    try:
        return parse_reference(name)
    except UsageError as error:
        raise RepoNotFound(f"no model {name[:200]!r} here", hint=error.hint, field="model") from error
