"""Sends what the outbox holds: signed, a few at a time, again after a failure, and in the end given up. Knows no route.

    pending --2xx--> done
       |  any other answer or none: again after 5 s, 20 s, 80 s ... at most 6 hours
       `--8th failure--> dead (kept in the journal; `retry` starts over)

Whoever claims a delivery books its next attempt first, so a process that dies in the middle loses nothing: at least
once, in no order; the receiver knows a repeated message by its `webhook-id`. Signed by the Standard Webhooks
specification: HMAC-SHA256 over id, timestamp and body.
"""

import asyncio
import base64
import hmac
import logging
import random
import time
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import msgspec
from sqlalchemy import Row, select, update

from loractl.adapters.errors import LoractlError, Unreachable
from loractl.hub import tables
from loractl.hub.database import Database
from loractl.hub.outbound import post
from loractl.hub.registry.event_log import event_of
from loractl.hub.registry.outbox import PENDING
from loractl.hub.registry.webhooks import SECRET_PREFIX
from loractl.hub.settings import HubSettings

_log = logging.getLogger("loractl.hub")

_LOOK_EVERY_S = 0.5
_BATCH = 16
_SEND_TIMEOUT_S = 10.0
# Longer than a sending can take: when it has passed, whoever claimed the delivery is dead.
_LEASE_S = 60.0
_LONGEST_WAIT_S = 6 * 3600.0


@dataclass(frozen=True, slots=True)
class Sent:
    """How a sending went."""

    status: int | None
    error: str | None

    @property
    def is_delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


def signature_headers(secret: str, *, message_id: str, at: int, body: bytes) -> dict[str, str]:
    """The three headers by which a receiver knows that the hub sent this, now, and nobody changed it."""
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    mac = hmac.digest(key, f"{message_id}.{at}.".encode() + body, sha256)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(at),
        "webhook-signature": f"v1,{base64.b64encode(mac).decode()}",
    }


class Dispatcher:
    """Sends for one process; several may run side by side."""

    def __init__(self, database: Database, settings: HubSettings) -> None:
        self._database = database
        self._settings = settings

    async def run(self) -> None:
        """Send what is due until cancelled."""
        while True:
            try:
                claimed = await self._claim()
                await asyncio.gather(*(self._deliver(row) for row in claimed))
            except Unreachable as error:
                _log.warning("webhooks: %s", error.message)
                claimed = []
            if len(claimed) < _BATCH:
                await asyncio.sleep(_LOOK_EVERY_S)

    async def send(self, url: str, secret: str, *, message_id: str, body: bytes) -> Sent:
        """Send one message now."""
        headers = {"content-type": "application/json", "user-agent": "loractl-hub"}
        headers |= signature_headers(secret, message_id=message_id, at=int(time.time()), body=body)
        try:
            status = await post(
                url,
                body=body,
                headers=headers,
                timeout_s=_SEND_TIMEOUT_S,
                allow_private=self._settings.webhook_private_addresses,
            )
        except LoractlError as error:
            return Sent(None, error.message[:200])
        return Sent(status, None if 200 <= status < 300 else f"answered {status}")

    async def _claim(self) -> "list[Row[Any]]":
        table, hook, event = tables.delivery, tables.webhook, tables.event
        now = time.time()
        due = select(table.c.id).where(table.c.state == PENDING, table.c.next_at <= now)
        # A look that takes no lock: mostly nothing is due.
        async with self._database.read() as connection:
            if (await connection.execute(due.limit(1))).first() is None:
                return []
        async with self._database.write() as connection:
            chosen = due.order_by(table.c.id).limit(_BATCH).with_for_update(skip_locked=True)
            numbers = (await connection.execute(chosen)).scalars().all()
            await connection.execute(
                update(table)
                .where(table.c.id.in_(numbers))
                .values(num_attempts=table.c.num_attempts + 1, next_at=now + _LEASE_S)
            )
            joined = table.join(hook, table.c.webhook == hook.c.id).join(event, table.c.event == event.c.id)
            query = select(
                event, table.c.id.label("delivery"), table.c.num_attempts, hook.c.url, hook.c.secret
            ).select_from(joined)
            return list((await connection.execute(query.where(table.c.id.in_(numbers)))).all())

    async def _deliver(self, row: "Row[Any]") -> None:
        body = msgspec.json.encode(event_of(row))
        sent = await self.send(row.url, row.secret, message_id=f"msg_{row.delivery}", body=body)
        now = time.time()
        values: dict[str, object] = {"last_status": sent.status, "last_error": sent.error}
        if sent.is_delivered:
            values |= {"state": "done", "done_at": now}
        elif row.num_attempts >= self._settings.webhook_attempts:
            values |= {"state": "dead", "done_at": now}
        else:
            wait_s = min(self._settings.webhook_retry_s * 4 ** (row.num_attempts - 1), _LONGEST_WAIT_S)
            values["next_at"] = now + wait_s * random.uniform(0.8, 1.2)  # noqa: S311
        async with self._database.write() as connection:
            table = tables.delivery
            # Unless somebody asked for a retry meanwhile, which starts over.
            still = (table.c.id == row.delivery, table.c.state == PENDING, table.c.num_attempts == row.num_attempts)
            await connection.execute(update(table).where(*still).values(**values))
