"""Webhooks and the journal of their deliveries: made, listed, taken away, tried again. Sends nothing.

Who administers repos may have their events sent: a webhook keeps the pattern of the token that made it, and nothing
beyond that pattern is ever put down for it. Its secret is shown once.
"""

import base64
import secrets
import time
from typing import Any
from urllib.parse import urlsplit

import msgspec
from sqlalchemy import Row, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from loractl.adapters.errors import BadRequest, Conflict, NotAllowed, NotFound
from loractl.hub import tables
from loractl.hub.actor import Actor
from loractl.hub.admin_wire import (
    DeliveryState,
    DeliveryView,
    WebhookCreate,
    WebhookCreated,
    WebhookView,
)
from loractl.hub.database import Database
from loractl.hub.moments import iso, iso_or_none
from loractl.hub.outbound import check_receiver
from loractl.hub.registry.journal import KINDS, record
from loractl.hub.registry.outbox import PENDING
from loractl.hub.settings import HubSettings

SECRET_PREFIX = "whsec_"  # noqa: S105
_MAX_WEBHOOKS = 100


class Webhooks:
    """What is sent where."""

    def __init__(self, database: Database, settings: HubSettings) -> None:
        self._database = database
        self._settings = settings

    async def create(self, wanted: WebhookCreate, *, actor: Actor) -> WebhookCreated:
        """Make a webhook. Raises NotAllowed for an address of this network, BadRequest, Unreachable."""
        _require_admin(actor)
        for kind in wanted.kinds:
            if kind not in KINDS:
                raise BadRequest(
                    f"unknown kind of event {kind[:40]!r}", hint=f"one of {', '.join(KINDS)}", field="kinds"
                )
        await check_receiver(wanted.url, allow_private=self._settings.webhook_private_addresses)
        secret = SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()
        table = tables.webhook
        async with self._database.write() as connection:
            if len((await connection.execute(select(table.c.id))).all()) >= _MAX_WEBHOOKS:
                raise Conflict(f"this hub has {_MAX_WEBHOOKS} webhooks, its limit", hint="delete one")
            values = {
                "url": wanted.url,
                "pattern": wanted.pattern,
                "scope": actor.pattern,
                "kinds": msgspec.json.encode(list(dict.fromkeys(wanted.kinds))).decode(),
                "secret": secret,
                "created_by": actor.name,
                "created_at": time.time(),
                "active": True,
            }
            row = (await connection.execute(insert(table).values(**values).returning(table))).one()
            # The host alone: what follows it may be somebody's secret.
            detail = {"host": urlsplit(wanted.url).hostname, "pattern": wanted.pattern}
            await record(connection, actor, "webhook.create", target=str(row.id), detail=detail)
        return WebhookCreated(webhook=_view(row), secret=secret)

    async def list_all(self, *, actor: Actor) -> list[WebhookView]:
        """Those that the actor may manage, newest first."""
        _require_admin(actor)
        async with self._database.read() as connection:
            rows = (await connection.execute(select(tables.webhook).order_by(tables.webhook.c.id.desc()))).all()
        return [_view(row) for row in rows if _may_manage(actor, row)]

    async def backlog(self) -> tuple[int, float]:
        """Deliveries that wait to be sent, over all webhooks, and for how many seconds the oldest of them has."""
        table = tables.delivery
        async with self._database.read() as connection:
            query = select(func.count(), func.min(table.c.created_at)).where(table.c.state == PENDING)
            num_pending, oldest_at = (await connection.execute(query)).one()
        return int(num_pending), 0.0 if oldest_at is None else max(0.0, time.time() - oldest_at)

    async def delete(self, number: int, *, actor: Actor) -> WebhookView:
        """Take one away with its journal; raises NotFound."""
        async with self._database.write() as connection:
            row = await _find(connection, number, actor=actor)
            await connection.execute(delete(tables.delivery).where(tables.delivery.c.webhook == number))
            await connection.execute(delete(tables.webhook).where(tables.webhook.c.id == number))
            await record(connection, actor, "webhook.delete", target=str(number), detail={})
        return _view(row)

    async def target(self, number: int, *, actor: Actor) -> tuple[str, str]:
        """Address and secret, for a sending by hand; raises NotFound."""
        async with self._database.read() as connection:
            row = await _find(connection, number, actor=actor)
        return row.url, row.secret

    async def deliveries(
        self, number: int, *, state: DeliveryState | None, limit: int, actor: Actor
    ) -> list[DeliveryView]:
        """The journal of one webhook, newest first; raises NotFound."""
        async with self._database.read() as connection:
            await _find(connection, number, actor=actor)
            return await _journal(connection, number, state=state, limit=limit)

    async def retry(self, number: int, delivery: int, *, actor: Actor) -> DeliveryView:
        """Send a delivery again from the start of its attempts; raises NotFound."""
        table = tables.delivery
        async with self._database.write() as connection:
            await _find(connection, number, actor=actor)
            done = await connection.execute(
                update(table)
                .where(table.c.id == delivery, table.c.webhook == number)
                .values(state=PENDING, num_attempts=0, next_at=time.time(), done_at=None)
            )
            if not done.rowcount:
                raise NotFound(f"webhook {number} has no delivery {delivery}")
            return (await _journal(connection, number, delivery=delivery, limit=1))[0]


def _require_admin(actor: Actor) -> None:
    if "admin" not in actor.roles:
        raise NotAllowed("webhooks take the role admin", hint="ask for a token with the role admin for your namespace")


def _may_manage(actor: Actor, row: "Row[Any]") -> bool:
    return actor.is_hub_admin or ("admin" in actor.roles and row.scope == actor.pattern)


async def _find(connection: AsyncConnection, number: int, *, actor: Actor) -> "Row[Any]":
    _require_admin(actor)
    row = (await connection.execute(select(tables.webhook).where(tables.webhook.c.id == number))).first()
    if row is None or not _may_manage(actor, row):
        raise NotFound(f"no webhook {number}", hint="`loractl hub webhook list` shows their numbers")
    return row


async def _journal(
    connection: AsyncConnection,
    number: int,
    *,
    limit: int,
    state: DeliveryState | None = None,
    delivery: int | None = None,
) -> list[DeliveryView]:
    table, event = tables.delivery, tables.event
    query = (
        select(table, event.c.kind, event.c.repo_id)
        .select_from(table.join(event, table.c.event == event.c.id))
        .where(table.c.webhook == number)
        .order_by(table.c.id.desc())
        .limit(limit)
    )
    if state is not None:
        query = query.where(table.c.state == state)
    if delivery is not None:
        query = query.where(table.c.id == delivery)
    return [_delivery(row) for row in (await connection.execute(query)).all()]


def _delivery(row: "Row[Any]") -> DeliveryView:
    return DeliveryView(
        id=row.id,
        event=row.event,
        kind=row.kind,
        repo_id=row.repo_id or None,
        state=row.state,
        num_attempts=row.num_attempts,
        next_at=iso(row.next_at) if row.state == PENDING else None,
        last_status=row.last_status,
        last_error=row.last_error,
        created_at=iso(row.created_at),
        done_at=iso_or_none(row.done_at),
    )


def _view(row: "Row[Any]") -> WebhookView:
    return WebhookView(
        id=row.id,
        url=row.url,
        pattern=row.pattern,
        scope=row.scope,
        kinds=msgspec.json.decode(row.kinds, type=list[str]),
        created_by=row.created_by,
        created_at=iso(row.created_at),
    )
