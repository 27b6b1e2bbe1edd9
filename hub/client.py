"""The hub as its own clients see it: names to digests, folders to versions, channels moved. Synchronous.

Files travel by huggingface_hub, so pushes and fetches work against any hub of that protocol; what only this project's
hub has lies under /api/loractl/v1 and says so elsewhere. Refuses to know the hub's insides and the command line.
"""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import msgspec

from loractl.adapters.digest import CARD_FILE, CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, adapter_digest, file_sha256
from loractl.adapters.errors import LoractlError, NotFound, RepoNotFound, RevisionNotFound, Unsupported
from loractl.adapters.local_cache import AdapterCache
from loractl.adapters.manifest import load_manifest
from loractl.adapters.reference import DEFAULT_REVISION, AdapterRef, Digest
from loractl.hub import client_errors
from loractl.hub.client_session import prepare_huggingface
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

DEFAULT_HUB = "http://127.0.0.1:8700"
_ADAPTER_FILES = [CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE, CARD_FILE]
_CONNECT_TIMEOUT_S = 3.0
_RETRY_STATUS = {429, 502, 503, 504}
_MAX_RETRY_WAIT_S = 5.0

T = TypeVar("T")


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


class HubClient:
    """Talks to one hub as one person; safe to share between threads. Close it, or use it in a `with`."""

    def __init__(
        self, endpoint: str = DEFAULT_HUB, token: str | None = None, *, timeout_s: float = 30.0, num_attempts: int = 3
    ) -> None:
        self.endpoint = endpoint.rstrip("/")
        self._token = token
        self._num_attempts = num_attempts
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(
            base_url=self.endpoint,
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=min(_CONNECT_TIMEOUT_S, timeout_s)),
            follow_redirects=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

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
            return ResolvedAdapter(
                repo_id=found.repo_id,
                revision=found.revision,
                commit=found.commit,
                digest=Digest(found.digest),
                version=found.version,
                base_id=found.base_id,
                base_fingerprint=found.base_fingerprint,
                rank=found.rank,
                size_bytes=found.size_bytes,
                yanked=found.yanked,
                canary=_canary(found),
            )
        if response.status_code == 404 and not client_errors.is_own_error(response.content):
            return self._resolve_elsewhere(ref)
        raise self._error(response, about=str(ref))

    def fetch(self, resolved: ResolvedAdapter, cache: AdapterCache) -> Path:
        """Give the adapter's folder in the cache, downloaded once and verified before anybody sees it."""

        def fill(folder: Path) -> None:
            from huggingface_hub import snapshot_download

            with client_errors.translated(self.endpoint, about=resolved.repo_id):
                snapshot_download(
                    resolved.repo_id,
                    revision=resolved.commit,
                    local_dir=folder,
                    endpoint=self.endpoint,
                    token=self._hf_token,
                    allow_patterns=_ADAPTER_FILES,
                    max_workers=4,
                )
            # Bookkeeping of the download, of no use in a folder that never changes.
            shutil.rmtree(folder / ".cache", ignore_errors=True)

        if (present := cache.get(resolved.digest)) is not None:
            return present
        prepare_huggingface()
        return cache.put(resolved.digest, fill)

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
            before = self._make_channel(ref, channel, private=private)
            files = self._additions(folder)
            commit = self._commit(files, ref, channel, parent=before, message=message or f"Push {ref.repo_id}")
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
    def _hf_token(self) -> str | bool:
        # False: a token that this person has for another hub must not go to this one.
        return self._token or False

    @property
    def _hf(self) -> Any:
        from huggingface_hub import HfApi

        prepare_huggingface()
        return HfApi(endpoint=self.endpoint, token=self._hf_token, library_name="loractl")

    def _check_reachable(self) -> None:
        # The upload calls retry a silent hub for half a minute; a typing error in --hub should not cost that.
        self._send("GET", "/api/whoami-v2")

    def _make_channel(self, ref: AdapterRef, channel: str, *, private: bool) -> str | None:
        """Return the commit that the channel points at before the push."""
        self._hf.create_repo(ref.repo_id, private=private or None, exist_ok=True)
        if channel != DEFAULT_REVISION:
            self._hf.create_branch(ref.repo_id, branch=channel, exist_ok=True)
        refs = self._hf.list_repo_refs(ref.repo_id)
        return next((str(branch.target_commit) for branch in refs.branches if branch.name == channel), None)

    def _additions(self, folder: Path) -> dict[str, Any]:
        from huggingface_hub import CommitOperationAdd

        names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        return {name: CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in names.items()}

    def _commit(self, files: dict[str, Any], ref: AdapterRef, channel: str, *, parent: str | None, message: str) -> str:
        from huggingface_hub import CommitOperationDelete

        operations: list[Any] = list(files.values())
        present = self._hf.list_repo_files(ref.repo_id, revision=channel) if parent else []
        gone = sorted(set(present) - files.keys() - {".gitattributes"})
        operations += [CommitOperationDelete(path_in_repo=name) for name in gone]
        made = self._hf.create_commit(
            ref.repo_id, operations, commit_message=message, revision=channel, parent_commit=parent
        )
        return str(made.oid)

    def _version_of(self, ref: AdapterRef, commit: str) -> str | None:
        at_commit = AdapterRef(ref.namespace, ref.name, commit)
        params = {"repo": at_commit.repo_id, "revision": commit}
        response = self._send("GET", f"{API_PREFIX}/resolve", params=params)
        return self._decode(response, Resolved).version if response.is_success else None

    def _resolve_elsewhere(self, ref: AdapterRef) -> ResolvedAdapter:
        """Resolve by the general protocol, on a hub that knows no digests: from the weights' hash and the config."""
        import tempfile

        from huggingface_hub import hf_hub_download

        with client_errors.translated(self.endpoint, about=str(ref)), tempfile.TemporaryDirectory() as work:
            info = self._hf.model_info(ref.repo_id, revision=ref.revision, files_metadata=True)
            files = {file.rfilename: file for file in info.siblings or []}
            weights = files.get(WEIGHTS_FILE)
            if weights is None or weights.lfs is None or CONFIG_FILE not in files:
                raise RevisionNotFound(f"{ref} holds no {CONFIG_FILE} with {WEIGHTS_FILE}")
            for name in {CONFIG_FILE, MANIFEST_FILE} & files.keys():
                hf_hub_download(
                    ref.repo_id,
                    name,
                    revision=info.sha,
                    local_dir=work,
                    endpoint=self.endpoint,
                    token=self._hf_token,
                )
            manifest = load_manifest(Path(work))
            digest = adapter_digest(
                config_sha256=file_sha256(Path(work) / CONFIG_FILE), weights_sha256=weights.lfs.sha256
            )
        pin = manifest.base if manifest is not None else None
        return ResolvedAdapter(
            repo_id=ref.repo_id,
            revision=ref.revision,
            commit=str(info.sha),
            digest=digest,
            version=None,
            base_id=pin.id if pin else None,
            base_fingerprint=pin.fingerprint if pin else None,
            rank=manifest.rank if manifest else None,
            size_bytes=sum(file.size or 0 for file in files.values()),
        )

    def _get(self, path: str, kind: type[T], *, params: dict[str, Any] | None = None, about: str = "") -> T:
        return self._own(self._send("GET", API_PREFIX + path, params=params), kind, about=about)

    def _post(self, path: str, body: msgspec.Struct, kind: type[T], *, about: str = "") -> T:
        content = msgspec.json.encode(body)
        return self._own(self._send("POST", API_PREFIX + path, content=content), kind, about=about)

    def _put(self, path: str, body: msgspec.Struct, kind: type[T], *, about: str = "") -> T:
        return self._own(self._send("PUT", API_PREFIX + path, content=msgspec.json.encode(body)), kind, about=about)

    def _own(self, response: httpx.Response, kind: type[T], *, about: str) -> T:
        if response.is_success:
            return self._decode(response, kind)
        if response.status_code in {404, 405, 501} and not client_errors.is_own_error(response.content):
            raise Unsupported(
                f"the hub at {self.endpoint} has no channels, versions and records: it is not a loractl hub",
                hint="push and pull work with it; for this command run `loractl hub serve`",
            )
        raise self._error(response, about=about)

    def _decode(self, response: httpx.Response, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(response.content, type=kind)
        except msgspec.DecodeError as error:
            raise Unsupported(
                f"the hub at {self.endpoint} gave an answer that this loractl does not understand: {error}",
                hint="bring hub and client to the same version",
            ) from error

    def _error(self, response: httpx.Response, *, about: str) -> LoractlError:
        error = client_errors.error_of_response(
            response.status_code, response.headers, response.content, place=self.endpoint, about=about
        )
        if type(error) is NotFound and about:
            return RepoNotFound(error.message, hint=error.hint)
        return error

    def _send(
        self, method: str, path: str, *, params: dict[str, Any] | None = None, content: bytes | None = None
    ) -> httpx.Response:
        """Send with bounded retries: reads on any trouble, writes only when they cannot have arrived."""
        headers = {"content-type": "application/json"} if content is not None else {}
        for attempt in range(1, self._num_attempts + 1):
            last = attempt == self._num_attempts
            wait_s = min(0.2 * 2**attempt, _MAX_RETRY_WAIT_S)
            try:
                response = self._http.request(method, path, params=params, content=content, headers=headers)
            except httpx.TransportError as error:
                if last or not (method == "GET" or isinstance(error, httpx.ConnectError)):
                    raise client_errors.unreachable(self.endpoint, error) from error
            else:
                if last or method != "GET" or response.status_code not in _RETRY_STATUS:
                    return response
                wait_s = _retry_after_s(response) or wait_s
            time.sleep(wait_s)
        raise client_errors.unreachable(self.endpoint)


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


def _retry_after_s(response: httpx.Response) -> float | None:
    try:
        return min(float(response.headers["Retry-After"]), _MAX_RETRY_WAIT_S)
    except (KeyError, ValueError):
        return None
