"""Webhooks, for admins of a namespace or of the hub. Translates only."""

import secrets
from typing import Annotated

import msgspec
from litestar import delete, get, post
from litestar.params import FromPath, JSONBody, QueryParameter

from loractl.hub.access import ActorDep, HubDep, Policy, policy
from loractl.hub.admin_wire import (
    DeliveryList,
    DeliveryState,
    DeliveryView,
    WebhookCreate,
    WebhookCreated,
    WebhookList,
    WebhookTest,
    WebhookView,
)
from loractl.hub.wire import API_PREFIX, DEFAULT_PAGE, MAX_PAGE

_HOOKS = API_PREFIX + "/webhooks"
Limit = Annotated[int, QueryParameter(ge=1, le=MAX_PAGE)]


@get(_HOOKS, opt=policy(Policy.TOKEN))
async def list_webhooks(hub: HubDep, actor: ActorDep) -> WebhookList:
    """The webhooks that this token may manage."""
    return WebhookList(webhooks=await hub.webhooks.list_all(actor=actor))


@post(_HOOKS, opt=policy(Policy.TOKEN), status_code=201)
async def create_webhook(data: JSONBody[WebhookCreate], hub: HubDep, actor: ActorDep) -> WebhookCreated:
    """Have events sent to an address; the secret that signs them is shown this once."""
    return await hub.webhooks.create(data, actor=actor)


@delete(_HOOKS + "/{number:int}", opt=policy(Policy.TOKEN), status_code=200)
async def delete_webhook(number: FromPath[int], hub: HubDep, actor: ActorDep) -> WebhookView:
    """Send no more."""
    return await hub.webhooks.delete(number, actor=actor)


@post(_HOOKS + "/{number:int}/test", opt=policy(Policy.TOKEN), status_code=200)
async def test_webhook(number: FromPath[int], hub: HubDep, actor: ActorDep) -> WebhookTest:
    """Send a message of kind `webhook.test` right now and say how that went."""
    url, secret = await hub.webhooks.target(number, actor=actor)
    body = msgspec.json.encode({"id": 0, "kind": "webhook.test", "repo_id": None, "data": {"webhook": number}})
    sent = await hub.dispatcher.send(url, secret, message_id=f"test_{secrets.token_hex(8)}", body=body)
    return WebhookTest(delivered=sent.is_delivered, status=sent.status, error=sent.error)


@get(_HOOKS + "/{number:int}/deliveries", opt=policy(Policy.TOKEN))
async def list_deliveries(
    number: FromPath[int],
    hub: HubDep,
    actor: ActorDep,
    delivery_state: Annotated[DeliveryState | None, QueryParameter(name="state")] = None,
    limit: Limit = DEFAULT_PAGE,
) -> DeliveryList:
    """What was sent, is waiting, or was given up."""
    found = await hub.webhooks.deliveries(number, state=delivery_state, limit=limit, actor=actor)
    return DeliveryList(deliveries=found)


@post(_HOOKS + "/{number:int}/deliveries/{delivery:int}/retry", opt=policy(Policy.TOKEN), status_code=200)
async def retry_delivery(number: FromPath[int], delivery: FromPath[int], hub: HubDep, actor: ActorDep) -> DeliveryView:
    """Send a delivery again."""
    return await hub.webhooks.retry(number, delivery, actor=actor)


ROUTES = [list_webhooks, create_webhook, delete_webhook, test_webhook, list_deliveries, retry_delivery]
