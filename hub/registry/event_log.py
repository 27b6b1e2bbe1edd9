"""Reads what the journal wrote, in its order and only as far as the reader may see. Knows no stream and no HTTP."""

import fnmatch
import time
from dataclasses import dataclass

import msgspec
from sqlalchemy import Row, delete, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from loractl.adapters.errors import EventsGone
from loractl.hub import tables
from loractl.hub.actor import Actor
from loractl.hub.database import Database
from loractl.hub.moments import iso
from loractl.hub.wire import EventPage, HubEvent

_SCAN = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class EventFilter:
    """What a reader wants; every part that is given must hold."""

    kinds: frozenset[str] = frozenset()
    repo: str | None = None
    """A name or a pattern, such as `demo/*`."""
    channel: str | None = None

    def takes(self, event: HubEvent) -> bool:
        if self.kinds and event.kind not in self.kinds:
            return False
        if self.repo is not None and not fnmatch.fnmatchcase((event.repo_id or "").casefold(), self.repo.casefold()):
            return False
        return self.channel is None or event.data.get("channel") == self.channel


EVERYTHING = EventFilter()


class EventLog:
    """The append-only list of events."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def newest(self) -> int:
        """The number of the last event; 0 before the first."""
        async with self._database.read() as connection:
            return (await _bounds(connection))[1]

    async def oldest_kept(self) -> int:
        """The number before the oldest event that is kept."""
        async with self._database.read() as connection:
            return max(0, (await _bounds(connection))[0] - 1)

    async def after(
        self, number: int, *, actor: Actor, wanted: EventFilter = EVERYTHING, limit: int = 500
    ) -> EventPage:
        """What came after an event, as far as the actor may see it. Raises EventsGone when some of it is not kept."""
        table, repo = tables.event, tables.repo
        joined = table.outerjoin(repo, table.c.repo == repo.c.id)
        async with self._database.read() as connection:
            oldest, newest = await _bounds(connection)
            if number > newest or (number + 1 < oldest):
                raise _gone(number, oldest, newest)
            query = (
                select(table, repo.c.private.label("is_private_now"))
                .select_from(joined)
                .where(table.c.id > number)
                .order_by(table.c.id)
                .limit(_SCAN)
            )
            rows = (await connection.execute(query)).all()
        found: list[HubEvent] = []
        for row in rows:
            if len(found) >= limit:
                break
            number = row.id
            if _may_see(actor, row) and wanted.takes(event := event_of(row)):
                found.append(event)
        return EventPage(events=found, next_after=number)

    async def prune(self, *, before: float) -> int:
        """Take away events from before a time, with their finished deliveries; the newest stays, so numbers grow on."""
        table, delivery = tables.event, tables.delivery
        async with self._database.write() as connection:
            waiting = (
                await connection.execute(select(func.min(delivery.c.event)).where(delivery.c.state == "pending"))
            ).scalar_one()
            last_old = (
                await connection.execute(select(func.max(table.c.id)).where(table.c.at < before))
            ).scalar_one() or 0
            newest = (await connection.execute(select(func.max(table.c.id)))).scalar_one() or 0
            # Without gaps at the old end: what is kept is everything from one number on.
            stop = min(last_old + 1, newest, *([] if waiting is None else [int(waiting)]))
            await connection.execute(delete(delivery).where(delivery.c.event < stop))
            done = await connection.execute(delete(table).where(table.c.id < stop))
        return int(done.rowcount)


async def _bounds(connection: AsyncConnection) -> tuple[int, int]:
    """Numbers of the oldest and newest event; (0, 0) when there is none."""
    # Two lookups in the key; one query with both would read every row on SQLite.
    number = tables.event.c.id
    oldest = (await connection.execute(select(func.min(number)))).scalar_one()
    newest = (await connection.execute(select(func.max(number)))).scalar_one()
    return int(oldest or 0), int(newest or 0)


def _gone(number: int, oldest: int, newest: int) -> EventsGone:
    kept = f"this hub keeps events {oldest} to {newest}"
    return EventsGone(
        f"events after {number} are not here: {kept}", hint="look at everything afresh, then follow without `after`"
    )


def _may_see(actor: Actor, row: "Row[tuple[object, ...]]") -> bool:
    if not row.repo_id:
        return actor.is_hub_admin
    # A repo that was hidden since hides its past too.
    return actor.may("read", row.repo_id, private=row.private or bool(row.is_private_now))


def event_of(row: "Row[tuple[object, ...]]") -> HubEvent:
    """A row of the table as it goes over the wire."""
    return HubEvent(
        id=row.id,
        kind=row.kind,
        at=iso(row.at),
        repo_id=row.repo_id or None,
        data=msgspec.json.decode(row.payload, type=dict[str, object]),
    )


def keep_since(keep_days: float) -> float:
    """The time before which events are old."""
    return time.time() - keep_days * 86400.0
