"""The audit log and quotas, for admins of the whole hub. Translates only."""

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated

import msgspec
from litestar import get, put
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter
from litestar.response import Stream

from loractl.hub.access import ActorDep, HubDep, Policy, policy
from loractl.hub.admin_wire import AuditEntry, QuotaList, QuotaSet, QuotaView
from loractl.hub.registry.audit_log import AuditFilter
from loractl.hub.wire import API_PREFIX

_NDJSON = "application/x-ndjson"

Number = Annotated[int, QueryParameter(ge=0, le=2**53)]
Limit = Annotated[int | None, QueryParameter(ge=1, le=10_000_000)]


@get(
    API_PREFIX + "/audit",
    opt=policy(Policy.HUB_ADMIN),
    responses={
        200: ResponseSpec(
            AuditEntry, generate_examples=False, media_type=_NDJSON, description="One entry per line, oldest first."
        )
    },
)
async def audit(
    *,
    hub: HubDep,
    after: Number = 0,
    since: FromQuery[datetime | None] = None,
    who: Annotated[str | None, QueryParameter(name="actor")] = None,
    action: FromQuery[str | None] = None,
    target: FromQuery[str | None] = None,
    limit: Limit = None,
) -> Stream:
    """Who did what, one JSON object a line, oldest first; goes on from the last line's `id` by `after`."""
    wanted = AuditFilter(
        after=after,
        since=None if since is None else since.timestamp(),
        actor=who,
        action=action,
        target=target,
        limit=limit,
    )

    async def lines() -> AsyncIterator[bytes]:
        async for entry in hub.audit.entries(wanted):
            yield msgspec.json.encode(entry) + b"\n"

    return Stream(lines(), media_type=_NDJSON)


@get(API_PREFIX + "/quotas", opt=policy(Policy.HUB_ADMIN))
async def list_quotas(hub: HubDep) -> QuotaList:
    """What each namespace may use and uses."""
    return QuotaList(quotas=await hub.quotas.list_all())


@put(API_PREFIX + "/quotas/{namespace:str}", opt=policy(Policy.HUB_ADMIN))
async def set_quota(namespace: FromPath[str], data: JSONBody[QuotaSet], hub: HubDep, actor: ActorDep) -> QuotaView:
    """Limit a namespace's bytes and repos."""
    return await hub.quotas.set(namespace, data, actor=actor)


ROUTES = [audit, list_quotas, set_quota]
