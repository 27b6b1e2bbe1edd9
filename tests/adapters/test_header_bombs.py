"""Headers made to cost much: each is refused, and none makes the reader hold more than 32 MiB."""

import io
import struct
import time
import tracemalloc
from collections.abc import Callable

import pytest

from drills import print_figures
from loractl.adapters.errors import CheckFailed
from loractl.adapters.tensors import MAX_HEADER_BYTES, MAX_TENSORS, read_header

BOUND_BYTES = 32 << 20


def _many(form: bytes, count: int, around: bytes) -> bytes:
    return around.replace(b"@", b",".join(form % number for number in range(count)))


BOMBS: dict[str, Callable[[], bytes]] = {
    "300,000 keys": lambda: _many(b'"%x":0', 300_000, b"{@}"),
    "300,000 tensors": lambda: _many(b'"%x":{}', 300_000, b"{@}"),
    "150,000 tensors with a dtype": lambda: _many(b'"%x":{"dtype":"U8"}', 150_000, b"{@}"),
    "a list of 300,000 texts": lambda: _many(b'"%x"', 300_000, b'{"a":[@]}'),
    "a list of 300,000 numbers": lambda: _many(b"%d.5", 300_000, b'{"a":[@]}'),
    "lists beside objects": lambda: _many(b'"%x":{"a":[1.5,2.5,3.5,4.5,5.5,6.5]}', MAX_TENSORS, b"{@}"),
    "long numbers": lambda: _many(b"%d" + b"9" * 1000, 4000, b'{"a":[@]}'),
    "one number": lambda: b'{"a":' + b"9" * (MAX_HEADER_BYTES - 16) + b"}",
    "one text": ('{"' + "\U0001f600" * (MAX_HEADER_BYTES // 4 - 16) + '":1}').encode,
    "escapes": lambda: b'{"a":"' + b"\\u00e9" * 600_000 + b'"}',
    "metadata of 300,000 keys": lambda: _many(b'"%x":"b"', 300_000, b'{"__metadata__":{@}}'),
    "one key 300,000 times": lambda: b"{" + b",".join([b'"a":0'] * 300_000) + b"}",
    "300,000 lists deep": lambda: b'{"a":' + b"[" * 300_000 + b"]" * 300_000 + b"}",
    "30,000 objects deep": lambda: b'{"a":' * 30_000 + b"1" + b"}" * 30_000,
    "spaces": lambda: b"{" + b" " * (MAX_HEADER_BYTES - 2) + b"}",
    "length of 100 MB": lambda: b"{" + b" " * (100 << 20) + b"}",
}


def _refuse(data: bytes) -> float:
    stream = io.BytesIO(data)
    started = time.perf_counter()
    with pytest.raises(CheckFailed) as raised:
        read_header(stream, where="bomb")
    assert raised.value.check in {"E_ST_HEADER", "E_ST_NAMES", "E_EMPTY"}
    assert len(str(raised.value)) < 1000
    return time.perf_counter() - started


@pytest.mark.parametrize("name", BOMBS)
def test_header_bomb_is_refused_in_little_memory(name: str) -> None:
    header = BOMBS[name]()
    data = struct.pack("<Q", len(header)) + header
    took_s = min(_refuse(data) for _ in range(3))
    tracemalloc.start()
    try:
        _refuse(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    print_figures(
        "header bomb", name=name, header_bytes=len(header), ms=round(took_s * 1000, 1), peak_mib=round(peak / 2**20, 1)
    )
    assert peak < BOUND_BYTES
