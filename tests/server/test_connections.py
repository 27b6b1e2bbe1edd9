"""A connection whose client does not get on is ended; one that works is kept."""

import asyncio
from typing import Any

from drills import encoded, head
from loractl.server.connection import ConnectionLimits, bounded_by


async def _answers(reader: asyncio.StreamReader) -> int:
    """How many whole answers come before the server cuts."""
    received = b""
    while more := await reader.read(1 << 16):
        received += more
    return received.count(b"HTTP/1.1 ")


async def test_headers_that_never_end_cut_the_connection(start_server: Any) -> None:
    live = await start_server(header_timeout_s=0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(live.url.rpartition(":")[2]))
    writer.write(b"GET /healthz HTTP/1.1\r\nx-slow: ")
    assert await asyncio.wait_for(_answers(reader), 20) == 0
    writer.close()


async def test_second_request_is_bounded_as_the_first(start_server: Any) -> None:
    live = await start_server(header_timeout_s=0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(live.url.rpartition(":")[2]))
    writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
    await reader.readuntil(b"}")
    writer.write(b"GET /healthz HTTP/1.1\r\nx-slow: ")
    assert await asyncio.wait_for(_answers(reader), 20) == 0
    writer.close()


async def test_request_that_runs_longer_than_headers_may_is_answered(start_server: Any) -> None:
    live = await start_server(header_timeout_s=0.2, prepare=lambda engine: setattr(engine, "step_s", 0.02))
    answer = await live.http.post("/v1/completions", content=encoded(max_tokens=40))
    assert answer.json()["usage"]["completion_tokens"] == 40


async def test_body_that_stalls_is_told_and_then_cut(start_server: Any) -> None:
    live = await start_server(header_timeout_s=0.2, body_timeout_s=0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(live.url.rpartition(":")[2]))
    writer.write(head(1000) + b"{")
    answer = await reader.readuntil(b"}}")
    assert b" 400 " in answer.splitlines()[0]
    writer.write(b" ")
    assert await asyncio.wait_for(_answers(reader), 20) == 0
    writer.close()


def test_limits_are_those_given() -> None:
    limits = ConnectionLimits(header_timeout_s=1.0, write_timeout_s=2.0)
    assert bounded_by(limits).limits is limits
