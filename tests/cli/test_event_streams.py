"""The measuring client against a socket that answers to order, byte by byte where that is hardest."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from loractl.cli.event_streams import EventStreams

EVENTS = b'data: {"a": 1}\n\ndata: {"b": 2}\n\ndata: [DONE]\n\n'
OPENING = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


def _chunked(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


class _Server:
    """Takes requests and answers the n-th with the n-th of `answers`."""

    def __init__(self, answers: list[Answer]) -> None:
        self.answers = answers
        self.num_connections = 0
        self.heads: list[bytes] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        while not reader.at_eof() and self.answers:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            self.heads.append(head)
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            await self.answers.pop(0)(writer)
        writer.close()


@pytest.fixture
async def server() -> AsyncIterator[_Server]:
    one = _Server([])
    listener = await asyncio.start_server(one.serve, "127.0.0.1", 0)
    one.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    yield one
    listener.close()


def _whole(raw: bytes) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        await writer.drain()

    return answer


async def _by_byte(writer: asyncio.StreamWriter) -> None:
    for byte in OPENING + _chunked(EVENTS):
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0)


async def test_events_are_the_same_however_they_are_cut_and_the_connection_is_kept(server: _Server) -> None:
    server.answers = [_whole(OPENING + _chunked(EVENTS)), _by_byte]
    streams = EventStreams(f"{server.url}/below", key="secret")
    heard: list[bytes] = []
    for _ in range(2):
        assert await streams.post("/v1/x", b"{}", heard.append) == 200
    streams.close()
    assert heard == [b'{"a": 1}', b'{"b": 2}', b"[DONE]"] * 2
    assert server.num_connections == 1
    assert server.heads[0].startswith(b"POST /below/v1/x HTTP/1.1\r\n")
    assert b"authorization: Bearer secret\r\n" in server.heads[0]


async def test_refusal_tells_its_status_and_a_closed_connection_is_not_used_again(server: _Server) -> None:
    refusal = b"HTTP/1.1 429 Too Many\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"
    server.answers = [_whole(refusal), _whole(OPENING + _chunked(EVENTS))]
    streams = EventStreams(server.url, key=None)
    heard: list[bytes] = []
    assert await streams.post("/", b"{}", heard.append) == 429
    assert heard == []
    assert await streams.post("/", b"{}", heard.append) == 200
    assert server.num_connections == 2
    streams.close()


async def test_broken_answers_are_errors_and_not_waits(server: _Server) -> None:
    async def cut(writer: asyncio.StreamWriter) -> None:
        writer.write(OPENING + b"5\r\ndata:")
        writer.close()

    server.answers = [cut, _whole(b"SSH-2.0-nothing\r\n")]
    streams = EventStreams(server.url, key=None)
    with pytest.raises(OSError, match="closed"):
        await streams.post("/", b"{}", lambda data: None)
    with pytest.raises(ValueError, match="no HTTP"):
        await streams.post("/", b"{}", lambda data: None)
