"""Reads a request's body within limits of size and time. Knows no route."""

import asyncio
from typing import Any

from litestar import Request

from loractl.adapters.errors import BadRequest
from loractl.server.serving import ServingSettings


async def read_body(request: Request[Any, Any, Any], settings: ServingSettings) -> bytes:
    """Give the whole body; a client that stalls is refused, a body that is too large is Litestar's 413."""
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            return await request.body()
    except TimeoutError as error:
        raise BadRequest(f"the body did not arrive in {settings.body_timeout_s:g} s") from error
