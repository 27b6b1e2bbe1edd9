"""What those who release from a hub or run it ask of it: withdraw, move, delete, webhooks, quotas, audit."""

from collections.abc import Iterator
from typing import Any

import httpx
import msgspec

from loractl.adapters.reference import AdapterRef
from loractl.hub import client_errors
from loractl.hub.admin_wire import (
    DeliveryList,
    DeliveryView,
    QuotaList,
    QuotaSet,
    QuotaView,
    WebhookCreate,
    WebhookCreated,
    WebhookList,
    WebhookTest,
    WebhookView,
)
from loractl.hub.client import HubClient
from loractl.hub.wire import API_PREFIX, Resolved, Yank


class _Nothing(msgspec.Struct):
    """An empty body."""


class HubAdmin(HubClient):
    """As `HubClient`, with the calls that need more than reading and pushing."""

    def yank(self, ref: AdapterRef, reason: str | None) -> Resolved:
        """Withdraw the reference's commit for a reason, or take that back by None."""
        body = Yank(revision=ref.revision, reason=reason)
        return self._post(f"/adapters/{ref.repo_id}/yank", body, Resolved, about=str(ref))

    def move(self, ref: AdapterRef, to: AdapterRef) -> None:
        """Give a repo another name."""
        with client_errors.translated(self.endpoint, about=ref.repo_id):
            self._hf.move_repo(ref.repo_id, to.repo_id)

    def delete(self, ref: AdapterRef) -> None:
        """Delete a repo with everything in it."""
        with client_errors.translated(self.endpoint, about=ref.repo_id):
            self._hf.delete_repo(ref.repo_id)

    def webhooks(self) -> list[WebhookView]:
        return self._get("/webhooks", WebhookList).webhooks

    def create_webhook(self, wanted: WebhookCreate) -> WebhookCreated:
        return self._post("/webhooks", wanted, WebhookCreated)

    def delete_webhook(self, number: int) -> WebhookView:
        return self._own(self._send("DELETE", f"{API_PREFIX}/webhooks/{number}"), WebhookView, about="")

    def test_webhook(self, number: int) -> WebhookTest:
        return self._post(f"/webhooks/{number}/test", _Nothing(), WebhookTest)

    def deliveries(self, number: int, *, state: str | None, limit: int) -> DeliveryList:
        params: dict[str, Any] = {"limit": limit} | ({"state": state} if state else {})
        return self._get(f"/webhooks/{number}/deliveries", DeliveryList, params=params)

    def retry_delivery(self, number: int, delivery: int) -> DeliveryView:
        return self._post(f"/webhooks/{number}/deliveries/{delivery}/retry", _Nothing(), DeliveryView)

    def quotas(self) -> list[QuotaView]:
        return self._get("/quotas", QuotaList).quotas

    def set_quota(self, namespace: str, wanted: QuotaSet) -> QuotaView:
        return self._put(f"/quotas/{namespace}", wanted, QuotaView)

    def audit(self, **wanted: Any) -> Iterator[str]:
        """The audit log's lines as they come, oldest first."""
        params = {name: value for name, value in wanted.items() if value is not None}
        try:
            with self._http.stream("GET", f"{API_PREFIX}/audit", params=params) as response:
                if not response.is_success:
                    response.read()
                    raise self._error(response, about="")
                yield from response.iter_lines()
        except httpx.TransportError as error:
            raise client_errors.unreachable(self.endpoint, error) from error
