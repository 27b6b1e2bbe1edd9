"""Request bodies as streams of bounded size. Knows no route."""

from collections.abc import AsyncIterator
from typing import Any

from litestar import Request
from litestar.exceptions import ClientException, InternalServerException

from loractl.adapters.errors import BadRequest, WillNotFit

AnyRequest = Request[Any, Any, Any]


def announced_bytes(request: AnyRequest) -> int | None:
    """`Content-Length`, where the client sent one."""
    text = request.headers.get("content-length")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit():
        raise BadRequest("Content-Length is not a number")
    return int(text)


async def body_chunks(request: AnyRequest, *, max_bytes: int) -> AsyncIterator[bytes]:
    """The body as it arrives; raises WillNotFit beyond `max_bytes`, BadRequest when the client leaves in the middle."""
    num_bytes = 0
    if (announced_bytes(request) or 0) > max_bytes:
        raise WillNotFit(f"a body of {announced_bytes(request):,} bytes is over the limit of {max_bytes:,}")
    try:
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise WillNotFit(f"the body is over the limit of {max_bytes:,} bytes")
            yield chunk
    except (ClientException, InternalServerException) as error:
        raise BadRequest("the client stopped sending in the middle of the body") from error


async def whole_body(request: AnyRequest, *, max_bytes: int) -> bytes:
    """A small body at once."""
    return b"".join([chunk async for chunk in body_chunks(request, max_bytes=max_bytes)])


async def body_lines(request: AnyRequest, *, max_bytes: int, max_line_bytes: int) -> AsyncIterator[bytes]:
    """The lines of a body as they arrive, without their ends; empty lines are left out."""
    pending = bytearray()
    async for chunk in body_chunks(request, max_bytes=max_bytes):
        searched = len(pending)
        pending += chunk
        while (end := pending.find(b"\n", searched)) >= 0:
            line = bytes(pending[:end])
            del pending[: end + 1]
            searched = 0
            if line.strip():
                yield line
        if len(pending) > max_line_bytes:
            raise WillNotFit(f"a line is over the limit of {max_line_bytes:,} bytes")
    if pending.strip():
        yield bytes(pending)
