"""Keeps a piece of work going beside the hub's requests. Knows no work."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from loractl.adapters.errors import LoractlError

_log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `work` while the block lasts."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass
        except LoractlError as error:
            _log.warning("%s had ended: %s", task.get_coro(), error.message)
