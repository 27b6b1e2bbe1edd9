"""The messages of `/api/loractl/v1` for those who run a hub: webhooks, quotas, the audit log. No rule, no I/O.

GET/POST  /webhooks     WebhookCreate -> WebhookCreated      GET -> WebhookList     DELETE /webhooks/{id} -> WebhookView
POST      /webhooks/{id}/test -> WebhookTest
GET       /webhooks/{id}/deliveries?state=&limit= -> DeliveryList
POST      /webhooks/{id}/deliveries/{delivery}/retry -> DeliveryView
GET       /quotas -> QuotaList          PUT /quotas/{namespace}  QuotaSet -> QuotaView
GET       /audit?after=&since=&actor=&action=&target=&limit=     one AuditEntry per line (application/x-ndjson)
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

DeliveryState = Literal["pending", "done", "dead"]


class WebhookCreate(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Ask for events to be sent to an address."""

    url: Annotated[str, Meta(min_length=1, max_length=2000)]
    pattern: Annotated[str, Meta(min_length=1, max_length=200)] = "*"
    """Of which repos, such as `demo/*`; never more than the token's own pattern covers."""
    kinds: Annotated[list[str], Meta(max_length=50)] = []
    """Which kinds of events; empty: all."""


class WebhookView(msgspec.Struct, kw_only=True):
    """A webhook without its secret."""

    id: int
    url: str
    pattern: str
    scope: str
    """The pattern of the token that made it; both patterns must cover a repo."""
    kinds: list[str]
    created_by: str
    created_at: str


class WebhookCreated(msgspec.Struct, kw_only=True):
    """A new webhook; `secret` is shown this once. Signatures are those of the Standard Webhooks specification."""

    webhook: WebhookView
    secret: str


class WebhookList(msgspec.Struct, kw_only=True):
    """All webhooks that this token may manage, newest first."""

    webhooks: list[WebhookView]


class WebhookTest(msgspec.Struct, kw_only=True):
    """How one sending right now went."""

    delivered: bool
    status: int | None
    error: str | None


class DeliveryView(msgspec.Struct, kw_only=True):
    """One event on its way to one webhook."""

    id: int
    event: int
    kind: str
    repo_id: str | None
    state: DeliveryState
    """`dead`: every attempt failed; it stays until it is retried by hand or its event is no longer kept."""
    num_attempts: int
    next_at: str | None
    last_status: int | None
    last_error: str | None
    created_at: str
    done_at: str | None


class DeliveryList(msgspec.Struct, kw_only=True):
    """The journal of one webhook, newest first."""

    deliveries: list[DeliveryView]


class QuotaSet(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Limit a namespace; null: the hub's default, 0: no limit, absent: as it is."""

    size_bytes: Annotated[int, Meta(ge=0, le=2**62)] | UnsetType | None = UNSET
    num_repos: Annotated[int, Meta(ge=0, le=2**31 - 1)] | UnsetType | None = UNSET


class QuotaView(msgspec.Struct, kw_only=True):
    """What a namespace may use and uses."""

    namespace: str
    quota_bytes: int
    """0: no limit."""
    used_bytes: int
    quota_repos: int
    num_repos: int
    is_default: bool
    """No limit of its own was set."""


class QuotaList(msgspec.Struct, kw_only=True):
    """All namespaces, by name."""

    quotas: list[QuotaView]


class AuditEntry(msgspec.Struct, kw_only=True):
    """One line of the audit log."""

    id: int
    at: str
    actor: str
    """Name and id of the token."""
    action: str
    target: str
    detail: dict[str, Any]
    request_id: str
