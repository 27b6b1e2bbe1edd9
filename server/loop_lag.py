"""How late the event loop wakes: what every stream feels when something blocks it. Knows no metrics library."""

import asyncio
from collections.abc import Callable

_INTERVAL_S = 0.25


async def watch_lag(observe: Callable[[float], None]) -> None:
    """Call `observe(seconds too late)` a few times a second, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _INTERVAL_S
        await asyncio.sleep(_INTERVAL_S)
        observe(max(0.0, loop.time() - due))
