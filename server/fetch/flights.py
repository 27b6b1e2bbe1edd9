"""One run of a thing, however many ask for it at the same time. Knows nothing of what it runs."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

_T = TypeVar("_T")


class Flights:
    """What is under way, by key; one key always has one type of result."""

    def __init__(self) -> None:
        self._running: dict[object, asyncio.Task[object]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._running

    def start(self, key: object, make: Callable[[], Awaitable[_T]]) -> "asyncio.Task[_T]":
        """Give the running task for `key`, or start it."""
        running = self._running.get(key)
        if running is not None:
            return running  # type: ignore[return-value]  # see the class

        async def fly() -> _T:
            return await make()

        task = asyncio.create_task(fly())
        self._running[key] = task
        task.add_done_callback(lambda done: self._landed(key, done))
        return task

    async def join(self, key: object, make: Callable[[], Awaitable[_T]], *, wait_s: float) -> _T:
        """As `start`, and wait; raises TimeoutError. A caller that leaves does not end it for the others."""
        return await asyncio.wait_for(asyncio.shield(self.start(key, make)), wait_s)

    async def close(self) -> None:
        for task in list(self._running.values()):
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    def _landed(self, key: object, task: "asyncio.Task[object]") -> None:
        self._running.pop(key, None)
        if not task.cancelled():
            task.exception()  # seen: what nobody waited for and failed is told by the next who waits
