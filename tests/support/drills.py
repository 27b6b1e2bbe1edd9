"""What every fault drill needs: its length, its line of figures, raw requests and streams. Knows no server."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

LONG = os.environ.get("LORACTL_DRILLS") == "long"
BODY: dict[str, Any] = {"model": "tiny", "prompt": "a quick brown fox", "max_tokens": 400, "ignore_eos": True}


def print_figures(drill: str, **figures: object) -> None:
    """One line for people; the drill's number is that of its table."""
    print(f"drill {drill}: " + ", ".join(f"{name}={value}" for name, value in figures.items()))


async def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> float:
    """Wait until `condition()` holds; gives the seconds it took."""
    started = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)
    return time.monotonic() - started


def encoded(**changes: Any) -> bytes:
    """A completion's body."""
    return msgspec.json.encode(BODY | changes)


def head(length: int) -> bytes:
    """The headers of a completion of `length` bytes."""
    lines = ["POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


async def open_request(port: int, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a completion on a connection of its own, by hand: no client library's time or descriptors are in it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head(len(body)) + body)
    await writer.drain()
    return reader, writer


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """One answer as it came."""

    status: int
    first_s: float
    """To the first event, or to the refusal's headers."""
    head: bytes
    tail: bytes
    """The end of what came."""

    @property
    def is_whole(self) -> bool:
        return self.tail.endswith((b"data: [DONE]\n\n", b"data: [DONE]\n\n\r\n0\r\n\r\n"))


async def stream(port: int, body: bytes, *, started: float | None = None) -> Streamed:
    """Stream an answer to its end; `started` is the moment that it is timed from."""
    started = time.monotonic() if started is None else started
    reader, writer = await open_request(port, body)
    status, first_s, answer, tail = 0, 0.0, b"", b""
    try:
        answer = await reader.readuntil(b"\r\n\r\n")
        status = int(answer.split(b" ", 2)[1])
        first_s = time.monotonic() - started
        if status == 200:
            tail = await reader.readuntil(b"data: ")
            first_s = time.monotonic() - started
            while more := await reader.read(1 << 16):
                tail = (tail + more)[-1000:]
                if tail.endswith(b"0\r\n\r\n"):
                    break
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()
    return Streamed(status=status, first_s=first_s, head=answer.lower(), tail=tail)


def share(values: Sequence[float], part: float) -> float:
    """A percentile by rank; `part` is 0.5 for the median."""
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]
