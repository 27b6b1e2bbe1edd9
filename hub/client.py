"""The hub as its own clients see it: names to digests, folders to versions, channels moved. Synchronous.

Files travel by huggingface_hub, so pushes and fetches work against any hub of that protocol; what only this project's
hub has lies under /api/loractl/v1 and says so elsewhere. Refuses to know the hub's insides and the command line.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from loractl.adapters.digest import CONFIG_FILE, WEIGHTS_FILE, adapter_digest
from loractl.adapters.errors import RevisionNotFound
from loractl.adapters.local_cache import AdapterCache
from loractl.adapters.reference import DEFAULT_REVISION, AdapterRef
from loractl.hub import client_errors, client_files
from loractl.hub.client_records import Pushed, ResolvedAdapter, resolved_adapter
from loractl.hub.client_transport import HubTransport
from loractl.hub.wire import (
    API_PREFIX,
    AdapterDetail,
    AdapterPage,
    AdapterSummary,
    ChannelMove,
    Diff,
    History,
    Promote,
    Resolved,
    Rollback,
)


class HubClient(HubTransport):
    """Talks to one hub as one person; safe to share between threads. Close it, or use it in a `with`."""

    # --- names and files

    def resolve(self, ref: AdapterRef) -> ResolvedAdapter:
        """Say what a name means now. Raises RepoNotFound, RevisionNotFound, NotAllowed, Unreachable."""
        response = self._send("GET", f"{API_PREFIX}/resolve", params={"repo": ref.repo_id, "revision": ref.revision})
        if response.is_success:
            found = self._decode(response, Resolved)
            if found.digest is None:
                raise RevisionNotFound(
                    f"{ref} holds no complete adapter", hint=f"it needs {CONFIG_FILE} and {WEIGHTS_FILE}"
                )
            return resolved_adapter(found, found.digest)
        if response.status_code == 404 and not client_errors.is_own_error(response.content):
            return client_files.resolve_by_files(self._hf, ref)
        raise self._error(response, about=str(ref))

    def fetch(self, resolved: ResolvedAdapter, cache: AdapterCache) -> Path:
        """Give the adapter's folder in the cache, downloaded once and verified before anybody sees it."""
        if (present := cache.get(resolved.digest)) is not None:
            return present
        api = self._hf
        return cache.put(
            resolved.digest, lambda folder: client_files.download(api, resolved.repo_id, resolved.commit, folder)
        )

    def push(
        self,
        folder: Path,
        ref: AdapterRef,
        *,
        channel: str = DEFAULT_REVISION,
        message: str = "",
        private: bool = False,
    ) -> Pushed:
        """Put a folder's files into the hub as one commit on a channel; the hub's checks decide.

        Makes the repo and the channel where they are new. Raises AdapterInvalid with what the checks found, NotAllowed,
        Conflict when somebody else pushed meanwhile, Unreachable.
        """
        self._check_reachable()
        with client_errors.translated(self.endpoint, about=ref.repo_id):
            api = self._hf
            before = client_files.make_channel(api, ref, channel, private=private)
            files = client_files.additions(folder)
            text = message or f"Push {ref.repo_id}"
            commit = client_files.commit(api, files, ref, channel, parent=before, message=text)
        # Hashed once, when they were made ready to be sent.
        config, weights = (files[name].upload_info.sha256.hex() for name in (CONFIG_FILE, WEIGHTS_FILE))
        digest = adapter_digest(config_sha256=config, weights_sha256=weights)
        version = self._version_of(ref, commit)
        return Pushed(repo_id=ref.repo_id, version=version, commit=commit, digest=digest, created=commit != before)

    # --- facts

    def list_adapters(
        self,
        *,
        base: str | None = None,
        text: str | None = None,
        task: str | None = None,
        rank: int | None = None,
        namespace: str | None = None,
        author: str | None = None,
        limit: int | None = None,
    ) -> Iterator[AdapterSummary]:
        """The adapters one may see, newest first, page by page; `base` is an id or a fingerprint."""
        asked = {"base": base, "text": text, "task": task, "rank": rank, "namespace": namespace, "author": author}
        params: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        num_left = limit
        while num_left is None or num_left > 0:
            page = self._get(
                "/adapters", AdapterPage, params=params | ({"limit": min(num_left, 1000)} if num_left else {})
            )
            yield from page.adapters
            num_left = None if num_left is None else num_left - len(page.adapters)
            if page.next_cursor is None:
                return
            params["cursor"] = page.next_cursor

    def show(self, ref: AdapterRef) -> AdapterDetail:
        """All that the hub knows of a repo, seen at the reference's revision."""
        params = {"revision": ref.revision}
        return self._get(f"/adapters/{ref.repo_id}", AdapterDetail, params=params, about=str(ref))

    def diff(self, a: AdapterRef, b: AdapterRef) -> Diff:
        """Compare two revisions."""
        return self._get("/diff", Diff, params={"a": str(a), "b": str(b)}, about=f"{a} or {b}")

    def history(self, ref: AdapterRef, *, channel: str | None = None, limit: int | None = None) -> list[ChannelMove]:
        """Who moved which channel of a repo, newest first."""
        params: dict[str, Any] = {"channel": channel} if channel else {}
        params |= {"limit": limit} if limit else {}
        return self._get(f"/adapters/{ref.repo_id}/history", History, params=params, about=ref.repo_id).moves

    # --- channels

    def promote(
        self,
        ref: AdapterRef,
        channel: str,
        *,
        expected_old: str | msgspec.UnsetType | None = msgspec.UNSET,
        reason: str = "",
        share: float | None = None,
    ) -> ChannelMove:
        """Move a channel to the reference's revision; raises Conflict when it no longer points at `expected_old`.

        With a `share` between 0 and 1 the channel stays, and servers give this share of its callers the revision.
        """
        body = Promote(
            channel=channel,
            revision=ref.revision,
            expected_old=expected_old,
            reason=reason,
            share=msgspec.UNSET if share is None else share,
        )
        return self._post(f"/adapters/{ref.repo_id}/promote", body, ChannelMove, about=str(ref))

    def rollback(self, ref: AdapterRef, channel: str, *, to: str | None = None, reason: str = "") -> ChannelMove:
        """End a channel's canary; without one, move it back to where it was, or to a revision that it has been at."""
        body = Rollback(channel=channel, to=to, reason=reason)
        return self._post(f"/adapters/{ref.repo_id}/rollback", body, ChannelMove, about=ref.repo_id)

    # --- how it is done

    @property
    def _hf(self) -> Any:
        return client_files.hf_api(self.endpoint, self._token)

    def _check_reachable(self) -> None:
        # The upload calls retry a silent hub for half a minute; a typing error in --hub should not cost that.
        self._send("GET", "/api/whoami-v2")

    def _version_of(self, ref: AdapterRef, commit: str) -> str | None:
        at_commit = AdapterRef(ref.namespace, ref.name, commit)
        params = {"repo": at_commit.repo_id, "revision": commit}
        response = self._send("GET", f"{API_PREFIX}/resolve", params=params)
        return self._decode(response, Resolved).version if response.is_success else None
