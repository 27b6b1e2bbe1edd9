"""Reads what Xet clients send: xorbs (chunks, packed) and shards (which chunks make which file). Knows files, no store.

xorb   = chunk* [footer "XETBLOB..."]      chunk = version u8=0 | packed u24le | scheme u8 | raw u24le | data
shard  = header 48 B | file* | 32 x FF ...
file   = hash 32 | flags u32 | n u32 | 8 B | n x segment 48 B | flag 31: n x 48 B | flag 30: 48 B with the sha256
segment= xorb hash 32 | flags u32 | raw bytes u32 | first chunk u32 | end chunk u32
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import lz4.frame
import numpy as np

from loractl.adapters.errors import BadData

MAX_XORB_BYTES = (64 << 20) + (1 << 20)
"""64 MiB of data and room for the headers of its chunks."""
MAX_XORB_RAW_BYTES = 64 << 20
MAX_XORB_CHUNKS = 8192
MAX_CHUNK_BYTES = 128 << 10
MAX_SHARD_BYTES = 64 << 20

_HEADER_BYTES = 8
_RECORD_BYTES = 48
_SHARD_HEADER_BYTES = 48
_FOOTER = b"XETBLOB"
_HAS_VERIFICATION = 1 << 31
_HAS_METADATA = 1 << 30
_NO_COMPRESSION, _LZ4, _GROUPED_LZ4 = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of chunks [first, end) of one xorb."""

    xorb: str
    num_bytes: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One file: its sha256 and the runs of chunks that make it."""

    sha256: str
    segments: tuple[Segment, ...]

    @property
    def size_bytes(self) -> int:
        return sum(segment.num_bytes for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Where one chunk lies in a xorb's file."""

    offset: int
    packed_bytes: int
    raw_bytes: int
    scheme: int


def hash_text(data: bytes) -> str:
    """The text form of a 32-byte hash: four little-endian words in hex."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))


def read_chunk_table(path: Path) -> list[Chunk]:
    """List the chunks of a xorb without unpacking any; raises BadData for sizes over the format's limits."""
    chunks: list[Chunk] = []
    total_raw = 0
    size = path.stat().st_size
    with path.open("rb") as stream:
        position = 0
        while position < size:
            header = stream.read(_HEADER_BYTES)
            if header.startswith(_FOOTER):
                break
            if len(header) < _HEADER_BYTES:
                raise BadData("the xorb ends inside a chunk's header")
            if header[0] != 0:
                raise BadData(f"chunk {len(chunks)} of the xorb has the unknown version {header[0]}")
            packed = int.from_bytes(header[1:4], "little")
            raw = int.from_bytes(header[5:8], "little")
            total_raw += raw
            if raw > MAX_CHUNK_BYTES or packed > 2 * MAX_CHUNK_BYTES or header[4] > _GROUPED_LZ4:
                raise BadData(f"chunk {len(chunks)} of the xorb is over the limits or packed in an unknown way")
            chunks.append(Chunk(position + _HEADER_BYTES, packed, raw, header[4]))
            if len(chunks) > MAX_XORB_CHUNKS or total_raw > MAX_XORB_RAW_BYTES:
                raise BadData("the xorb holds more than 64 MiB or 8192 chunks")
            position += _HEADER_BYTES + packed
            if position > size:
                raise BadData(f"the xorb ends inside chunk {len(chunks) - 1}")
            stream.seek(position)
    if not chunks:
        raise BadData("the xorb holds no chunk")
    return chunks


def unpack_chunk(stream: BinaryIO, chunk: Chunk) -> bytes:
    """Read one chunk; raises BadData when it is not what its header says."""
    stream.seek(chunk.offset)
    data = stream.read(chunk.packed_bytes)
    if chunk.scheme != _NO_COMPRESSION:
        try:
            # The limit is asked for, so a small chunk that unpacks to gigabytes stops here.
            data = lz4.frame.LZ4FrameDecompressor().decompress(data, max_length=chunk.raw_bytes + 1)
        except (RuntimeError, EOFError) as error:
            raise BadData("a chunk of the xorb cannot be unpacked") from error
        if chunk.scheme == _GROUPED_LZ4:
            data = _ungrouped(data)
    if len(data) != chunk.raw_bytes:
        raise BadData("a chunk of the xorb has another size than its header says")
    return data


def _ungrouped(data: bytes) -> bytes:
    """Undo the grouping of every fourth byte."""
    count = len(data)
    lengths = [(count + 3 - lane) // 4 for lane in range(4)]
    grouped = np.frombuffer(data, dtype=np.uint8)
    plain = np.empty(count, dtype=np.uint8)
    start = 0
    for lane, length in enumerate(lengths):
        plain[lane::4] = grouped[start : start + length]
        start += length
    return plain.tobytes()


def read_shard(data: bytes) -> list[ShardFile]:
    """List the files of a shard; raises BadData when it is cut or names no sha256."""
    return list(_shard_files(memoryview(data)))


def _shard_files(data: memoryview) -> Iterator[ShardFile]:
    position = _SHARD_HEADER_BYTES
    while True:
        header = _record(data, position)
        if header[:32] == b"\xff" * 32:
            return
        flags, count = struct.unpack_from("<II", header, 32)
        position += _RECORD_BYTES
        segments: list[Segment] = []
        if count > len(data) // _RECORD_BYTES:
            raise BadData("the shard ends inside a file")
        for _ in range(count):
            record = _record(data, position)
            _, num_bytes, first, end = struct.unpack_from("<IIII", record, 32)
            if end < first:
                raise BadData("a run of chunks in the shard ends before it begins")
            segments.append(Segment(hash_text(record[:32]), num_bytes, first, end))
            position += _RECORD_BYTES
        if flags & _HAS_VERIFICATION:
            position += count * _RECORD_BYTES
        if not flags & _HAS_METADATA:
            raise BadData("a file in the shard has no sha256", hint="update the client: huggingface_hub >= 1.20")
        sha256 = hash_text(_record(data, position)[:32])
        position += _RECORD_BYTES
        yield ShardFile(sha256, tuple(segments))


def _record(data: memoryview, position: int) -> bytes:
    record = bytes(data[position : position + _RECORD_BYTES])
    if len(record) < _RECORD_BYTES:
        raise BadData("the shard is cut short")
    return record
