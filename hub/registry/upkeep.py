"""What gc and fsck did, a row each, wherever they ran: the hub's own page of metrics tells of them. Knows no blob."""

import time

from sqlalchemy import case, func, insert, select

from loractl.hub import tables
from loractl.hub.database import Database
from loractl.hub.registry.records import UpkeepKind, UpkeepTotals


class Upkeep:
    """Notes runs and adds them up."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def note(
        self, kind: UpkeepKind, *, succeeded: bool, num_blobs: int = 0, num_corrupt: int = 0, num_missing: int = 0
    ) -> None:
        """Write down one run that has ended."""
        values = {"num_blobs": num_blobs, "num_corrupt": num_corrupt, "num_missing": num_missing}
        async with self._database.write() as connection:
            await connection.execute(
                insert(tables.upkeep).values(kind=kind, succeeded=succeeded, at=time.time(), **values)
            )

    async def totals(self) -> dict[UpkeepKind, UpkeepTotals]:
        """What all runs of each kind came to; a kind that never ran is there with zeros."""
        table = tables.upkeep
        query = select(
            table.c.kind,
            func.sum(case((table.c.succeeded, 1), else_=0)).label("num_succeeded"),
            func.sum(case((table.c.succeeded, 0), else_=1)).label("num_failed"),
            func.sum(table.c.num_blobs).label("num_blobs"),
            func.sum(table.c.num_corrupt).label("num_corrupt"),
            func.sum(table.c.num_missing).label("num_missing"),
            func.max(case((table.c.succeeded, table.c.at), else_=0.0)).label("last_success_at"),
        ).group_by(table.c.kind)
        found = dict.fromkeys(UpkeepKind, UpkeepTotals())
        async with self._database.read() as connection:
            for row in await connection.execute(query):
                found[UpkeepKind(row.kind)] = UpkeepTotals(
                    num_succeeded=int(row.num_succeeded),
                    num_failed=int(row.num_failed),
                    num_blobs=int(row.num_blobs),
                    num_corrupt=int(row.num_corrupt),
                    num_missing=int(row.num_missing),
                    last_success_at=float(row.last_success_at),
                )
        return found
