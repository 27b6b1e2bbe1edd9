"""Runs gc, noted so that the page of metrics tells of it, and again once a period by itself. Knows no blob.

Each process of a hub looks whether a period has passed since any of them, or an operator, last ended a run well. Two
that look at the same moment both run, which is safe and seldom: each waits a while of its own.
"""

import asyncio
import contextlib
import logging
import random
import time

from loractl.adapters.errors import LoractlError, Unreachable
from loractl.hub.collect import Collected, collect
from loractl.hub.registry.records import UpkeepKind
from loractl.hub.services import Hub

_log = logging.getLogger(__name__)

_LONGEST_SPREAD_S = 600.0
_RETRY_S = 3600.0


async def collect_and_note(hub: Hub, *, grace_s: float) -> Collected:
    """Run gc once and write down how it ended; raises what gc raises."""
    try:
        done = await collect(hub, grace_s=grace_s)
    except LoractlError:
        with contextlib.suppress(Unreachable):
            await hub.upkeep.note(UpkeepKind.GC, succeeded=False)
        raise
    await hub.upkeep.note(UpkeepKind.GC, succeeded=True, num_blobs=done.num_blobs + done.num_orphans)
    return done


async def keep_collecting(hub: Hub) -> None:
    """Run gc every `gc_every_s` seconds until cancelled; never where that is 0."""
    every_s = hub.settings.gc_every_s
    if not every_s:
        return
    started_at = time.time()
    while True:
        spread_s = random.uniform(0.0, min(_LONGEST_SPREAD_S, every_s / 10))  # noqa: S311 - no secret
        try:
            last = (await hub.upkeep.totals())[UpkeepKind.GC].last_success_at or started_at
            wait_s = last + every_s - time.time()
            if wait_s > 0:
                await asyncio.sleep(wait_s + spread_s)
                continue  # another process may have run it meanwhile
            await asyncio.sleep(spread_s)
            done = await collect_and_note(hub, grace_s=hub.settings.gc_grace_s)
            _log.info("gc removed %d blobs, %d bytes, %d orphans", done.num_blobs, done.num_bytes, done.num_orphans)
        except LoractlError as error:
            _log.warning("gc: %s", error.message)
            await asyncio.sleep(min(_RETRY_S, every_s))
