"""The messages of `/api/loractl/v1`: what goes over the wire between a hub and its own clients. No rule, no I/O.

    GET    /resolve?repo=team/name&revision=prod      -> Resolved
    GET    /adapters?base=&text=&task=&rank=&namespace=&author=&limit=&cursor=   -> AdapterPage
    GET    /adapters/{team}/{name}?revision=prod      -> AdapterDetail
    GET    /adapters/{team}/{name}/validation?revision=  -> ValidationRecord
    GET    /adapters/{team}/{name}/history?channel=&limit=  -> History
    POST   /adapters/{team}/{name}/promote            Promote  -> ChannelMove
    POST   /adapters/{team}/{name}/rollback           Rollback -> ChannelMove
    POST   /adapters/{team}/{name}/protect            Protect  -> ChannelView
    POST   /adapters/{team}/{name}/yank               Yank     -> Resolved
    GET    /diff?a=team/name@v1&b=team/name@v2        -> Diff
    GET    /events?after=&kind=&repo=&channel=        -> EventPage; as text/event-stream: HubEvent for HubEvent
    GET    /tokens -> TokenList      POST /tokens  TokenCreate -> TokenCreated      DELETE /tokens/{id} -> TokenView

A revision is a version tag, a channel, or a commit id (whole, or at least 7 digits of it). Every error, here and on the
Hugging Face routes, is `ErrorBody` with the status of its class in `loractl.adapters.errors`; the header `X-Error-Code`
carries the Hugging Face name of it (`RepoNotFound`, ...) where there is one.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

API_PREFIX = "/api/loractl/v1"

DEFAULT_PAGE = 100
MAX_PAGE = 1000

CommitId = Annotated[str, Meta(pattern="^[0-9a-f]{40}$")]
Reason = Annotated[str, Meta(max_length=2000)]
TokenRole = Literal["read", "write", "promote", "admin"]
Level = Literal["reject", "warn", "info"]
Share = Annotated[float, Meta(gt=0, lt=1)]
MoveKind = Literal["push", "create", "promote", "rollback", "delete", "canary", "canary-end"]
"""The last two leave the channel where it is."""


class ErrorBody(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What went wrong; `error` is what Hugging Face clients print."""

    error: str
    code: str
    """As in `loractl.adapters.errors`, such as `REVISION_NOT_FOUND`."""
    hint: str | None = None
    field: str | None = None
    request_id: str | None = None


class Canary(msgspec.Struct, kw_only=True):
    """A second revision that a share of a channel's callers gets; everybody else, and every other client, does not."""

    share: float
    """Between 0 and 1; servers choose by caller, so that a caller stays with one revision."""
    commit: str
    digest: str | None
    version: str | None
    base_id: str | None
    base_fingerprint: str | None
    rank: int | None
    size_bytes: int
    by: str
    at: str
    reason: str


class Resolved(msgspec.Struct, kw_only=True):
    """One revision made exact: what a server needs to fetch and to cache an adapter."""

    repo_id: str
    revision: str
    """As it was asked for."""
    commit: str
    digest: str | None
    """`sha256:<hex>`, the adapter's identity; None when the commit holds no complete adapter."""
    version: str | None
    """The immutable tag of this content, such as `v3`; None where the commit has none."""
    base_id: str | None
    base_fingerprint: str | None
    """`sha256:<hex>` from the manifest; None when the push did not pin its base."""
    rank: int | None
    size_bytes: int
    """Of all files of the commit."""
    adapter_size_bytes: int
    """Of the two files that make the digest."""
    yanked: str | None = None
    """The reason, when this commit was withdrawn: it still resolves by version or commit id, with a warning."""
    canary: Canary | None = None
    """Set where the revision is a channel that tries another one."""


class AdapterSummary(msgspec.Struct, kw_only=True):
    """One repo in a list, told by its `main`."""

    repo_id: str
    private: bool
    commit: str
    digest: str | None
    version: str | None
    """The newest version tag of the repo."""
    base_id: str | None
    base_fingerprint: str | None
    task: str | None
    rank: int | None
    size_bytes: int
    updated_at: str
    """RFC 3339, UTC."""
    num_downloads: int = 0
    channels: dict[str, str] = {}
    """Channel -> version tag, or the commit id where there is no tag."""


class AdapterPage(msgspec.Struct, kw_only=True):
    """Part of a list, newest first; ask again with `cursor=next_cursor` until it is None."""

    adapters: list[AdapterSummary]
    next_cursor: str | None = None


class Finding(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one check found."""

    code: str
    """Such as `E_AB`; the table is in `loractl.adapters.validation`."""
    level: Level
    message: str
    hint: str | None = None
    path: str | None = None


class ValidationRecord(msgspec.Struct, kw_only=True):
    """The verdict on one commit, as it was given at push."""

    commit: str
    validator_version: str
    checked_at: str
    findings: list[Finding] = []
    """Empty when every check passed; a commit with a `reject` was never made."""
    digests: dict[str, str] = {}
    """Folder of each adapter in the commit ("" is the root) -> its digest."""


class FileView(msgspec.Struct, kw_only=True):
    """One file of a commit."""

    path: str
    size_bytes: int
    sha256: str


class VersionView(msgspec.Struct, kw_only=True):
    """One immutable version of a repo."""

    version: str
    commit: str
    digest: str | None
    created_at: str
    author: str
    message: str
    size_bytes: int
    metrics: dict[str, float] = {}
    yanked: str | None = None


class ChannelView(msgspec.Struct, kw_only=True):
    """One movable name and where it points."""

    channel: str
    commit: str
    version: str | None
    protected: bool
    """Moving it needs the right `promote`."""
    updated_at: str
    canary: Canary | None = None


class AdapterDetail(msgspec.Struct, kw_only=True):
    """All that a hub knows of one repo, seen at one revision."""

    repo_id: str
    private: bool
    created_at: str
    resolved: Resolved
    versions: list[VersionView]
    """Newest first."""
    channels: list[ChannelView]
    files: list[FileView]
    validation: ValidationRecord | None
    config: dict[str, Any] | None
    """`adapter_config.json` at this revision."""
    manifest: dict[str, Any] | None
    """`loractl.json` at this revision: base, data, recipe, metrics, loss curve, parent."""
    card: str | None
    """`README.md` at this revision."""
    num_downloads: int = 0
    parent: str | None = None
    """The version in this repo that training started from, such as `v1`; None where it is not here."""


class Promote(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Move `channel` to `revision`; makes the channel when it is new. Any move of a channel ends its canary."""

    channel: str
    revision: str
    expected_old: CommitId | UnsetType | None = UNSET
    """Move only if the channel still points here (null: only if it does not exist yet); absent: move in any case."""
    reason: Reason = ""
    share: Share | UnsetType = UNSET
    """Given: leave the channel where it is, and send this share of its callers to `revision`."""


class Rollback(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """End the channel's canary; without one, move it back to where it was before its last move that was not undone."""

    channel: str
    to: str | None = None
    """A revision that the channel has pointed at before; None: the one before the present."""
    expected_old: CommitId | UnsetType = UNSET
    reason: Reason = ""


class ChannelMove(msgspec.Struct, kw_only=True):
    """One line of a channel's history."""

    id: int
    """Grows over the whole hub."""
    repo_id: str
    channel: str
    kind: MoveKind
    old_commit: str | None
    new_commit: str | None
    """None when the channel was deleted."""
    old_version: str | None
    new_version: str | None
    by: str
    at: str
    reason: str
    share: float | None = None
    """Of callers, where a canary began: `new` is the revision that they get, `old` the one that the channel keeps."""


class History(msgspec.Struct, kw_only=True):
    """Who moved which channel, newest first."""

    moves: list[ChannelMove]


class Protect(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Let only holders of the right `promote` move a channel, or everybody who may write."""

    channel: str
    protected: bool = True


class Yank(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Withdraw a version: it still resolves by its exact name, with a warning. `reason` null takes that back."""

    revision: str
    reason: Annotated[str, Meta(min_length=1, max_length=2000)] | None


class Difference(msgspec.Struct, kw_only=True):
    """One value that is not the same; nested names are joined by dots."""

    name: str
    a: Any
    b: Any


class LayerDifference(msgspec.Struct, kw_only=True):
    """What both do to one weight of the base: Frobenius norms of the changes, and of their difference."""

    module: str
    a: float | None
    """None where that adapter leaves the weight alone."""
    b: float | None
    difference: float | None
    """None where it cannot be said: other shapes, DoRA, a bias."""


class Diff(msgspec.Struct, kw_only=True):
    """Two revisions compared; equal parts are left out."""

    a: Resolved
    b: Resolved
    config: list[Difference]
    recipe: list[Difference]
    data: list[Difference]
    metrics: list[Difference]
    targets_only_in_a: list[str]
    targets_only_in_b: list[str]
    layers: list[LayerDifference]
    difference: float | None
    """Of all layers together; None where one cannot be said."""


class HubEvent(msgspec.Struct, kw_only=True):
    """Something that changed; the kinds and their data are in `loractl.hub.registry.journal`."""

    id: int
    """Grows over the whole hub, with gaps."""
    kind: str
    at: str
    repo_id: str | None
    """As it was called then; None where the change concerns the whole hub."""
    data: dict[str, Any] = {}


class EventPage(msgspec.Struct, kw_only=True):
    """Events in their order; ask again with `after=next_after` for what came since."""

    events: list[HubEvent]
    next_after: int


class TokenCreate(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Ask for a token."""

    name: Annotated[str, Meta(min_length=1, max_length=100)]
    roles: Annotated[list[TokenRole], Meta(min_length=1)]
    """`write` and `promote` imply `read`; `admin` implies all."""
    pattern: Annotated[str, Meta(min_length=1, max_length=200)] = "*"
    """Which repos it is good for, such as `demo/*`."""
    expires_in_days: Annotated[int, Meta(ge=1, le=3660)] | None = None


class TokenView(msgspec.Struct, kw_only=True):
    """A token without its secret."""

    id: str
    name: str
    roles: list[TokenRole]
    pattern: str
    last4: str
    created_at: str
    expires_at: str | None
    last_used_at: str | None
    revoked_at: str | None


class TokenCreated(msgspec.Struct, kw_only=True):
    """A new token; `secret` is shown this once."""

    token: TokenView
    secret: str


class TokenList(msgspec.Struct, kw_only=True):
    """All tokens, newest first."""

    tokens: list[TokenView]
