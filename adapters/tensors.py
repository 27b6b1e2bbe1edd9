"""The one strict reader of safetensors files; what it takes, every part of the project reads the same way.

Stricter than the format's own library, which accepts duplicate keys, `../` names, empty tensors and headers of 100 MB.
Knows numpy and files; refuses to know torch, adapters and what the tensors mean.
"""

import json
import mmap
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt

from loractl.adapters.errors import CheckFailed

MAX_HEADER_BYTES = 4 << 20
MAX_TENSORS = 20_000
MAX_DIMENSIONS = 8
MAX_NAME_LENGTH = 512
MAX_METADATA_BYTES = 64 << 10

# Square brackets, commas and colons of one tensor: nine and one more for each dimension. Of all: most have two.
# Together they bound what a hostile header can make us build.
_MAX_STRUCTURE_OF_ONE = 9 + MAX_DIMENSIONS
_MAX_STRUCTURE = 14 * MAX_TENSORS
_NAME = re.compile(r"[A-Za-z0-9_.\-]+")
_CHUNK_BYTES = 4 << 20

# name in the header -> (bytes per element, numpy type that views it)
_DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (1, "?"),
    "U8": (1, "u1"),
    "I8": (1, "i1"),
    "F8_E4M3": (1, "u1"),
    "F8_E5M2": (1, "u1"),
    "U16": (2, "<u2"),
    "I16": (2, "<i2"),
    "F16": (2, "<f2"),
    "BF16": (2, "<u2"),
    "U32": (4, "<u4"),
    "I32": (4, "<i4"),
    "F32": (4, "<f4"),
    "U64": (8, "<u8"),
    "I64": (8, "<i8"),
    "F64": (8, "<f8"),
    "C64": (8, "<c8"),
}
# Floats that numpy sees as integers: all exponent bits set (E4M3: all bits) is what is not finite.
_NOT_FINITE_MASK = {"BF16": 0x7F80, "F8_E5M2": 0x7C, "F8_E4M3": 0x7F}

AnyArray = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor's place: `start` and `end` are byte offsets from the beginning of the file."""

    name: str
    dtype: str
    """As in the header: F32, F16, BF16, ..."""
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


class TensorFile:
    """A file whose header was read and found sound; values are read on demand.

    `entries` are in the order of their bytes. The source must not change while this object lives.
    """

    def __init__(
        self,
        source: BinaryIO | mmap.mmap,
        *,
        where: str,
        entries: Mapping[str, TensorEntry],
        metadata: Mapping[str, str],
        size_bytes: int,
    ) -> None:
        self._source = source
        self.where = where
        self.entries = entries
        self.metadata = metadata
        self.size_bytes = size_bytes

    def buffer(self, entry: TensorEntry) -> memoryview:
        """The raw bytes of one tensor: a view of the map for a file on disk, a copy for a stream."""
        return self._slice(entry.start, entry.end)

    def read(self, name: str) -> AnyArray:
        """One tensor in its shape; BF16 comes as its uint16 bits, 8-bit floats as uint8; read-only."""
        entry = self.entries[name]
        return np.frombuffer(self.buffer(entry), dtype=_DTYPES[entry.dtype][1]).reshape(entry.shape)

    def read_float32(self, name: str) -> npt.NDArray[np.float32]:
        """One tensor of F32, F16, BF16 or F64 as float32."""
        return _as_float32(self.read(name), self.entries[name].dtype)

    def chunks(self, name: str) -> Iterator[AnyArray]:
        """The tensor's values flat, at most 4 MiB at a time."""
        entry = self.entries[name]
        for start in range(entry.start, entry.end, _CHUNK_BYTES):
            stop = min(start + _CHUNK_BYTES, entry.end)
            yield np.frombuffer(self._slice(start, stop), dtype=_DTYPES[entry.dtype][1])
            self._release(start, stop)

    def release(self, name: str) -> None:
        """Give back the memory that reading a tensor of a mapped file took; what was read stays valid."""
        self._release(self.entries[name].start, self.entries[name].end)

    def first_not_finite(self) -> str | None:
        """Name the first tensor that holds a NaN or an infinity; bounded memory."""
        return next((name for name in self.entries if not self.is_finite(name)), None)

    def is_finite(self, name: str) -> bool:
        """Tell whether one tensor is free of NaN and infinities."""
        dtype = self.entries[name].dtype
        if mask := _NOT_FINITE_MASK.get(dtype):
            return not any(((chunk & mask) == mask).any() for chunk in self.chunks(name))
        if dtype in {"F16", "F32", "F64", "C64"}:
            return all(np.isfinite(chunk).all() for chunk in self.chunks(name))
        return True

    def _release(self, start: int, end: int) -> None:
        if isinstance(self._source, mmap.mmap):
            # The pages are the file's: whoever looks again gets them from the page cache or the disk.
            begin = start - start % mmap.PAGESIZE
            self._source.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _slice(self, start: int, end: int) -> memoryview:
        if isinstance(self._source, mmap.mmap):
            return memoryview(self._source)[start:end]
        self._source.seek(start)
        piece = self._source.read(end - start)
        if len(piece) != end - start:
            raise CheckFailed(f"{self.where}: the file ends early", check="E_ST_HEADER")
        return memoryview(piece)


@dataclass(frozen=True, slots=True)
class MappedFile:
    """A file whose header was not looked at yet; those of equal header and size pass or fail `check` alike."""

    source: mmap.mmap
    header: bytes
    where: str

    def check(self) -> TensorFile:
        """Check the header; raises CheckFailed (E_ST_HEADER, E_ST_NAMES, E_EMPTY)."""
        return _check(self.source, self.header, len(self.source), where=self.where)


def map_tensors(path: Path, *, where: str | None = None) -> MappedFile:
    """Map a file; raises CheckFailed (E_ST_HEADER) where it holds no header of a size that is taken."""
    shown = where or str(path)
    with path.open("rb") as stream:
        if stream.seek(0, 2) < 8:
            _refuse(shown, "shorter than the 8 bytes of a header's length")
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return MappedFile(mapped, _header(mapped, len(mapped), where=shown), shown)


def open_tensors(path: Path, *, where: str | None = None) -> TensorFile:
    """Map a file and check its header; raises CheckFailed (E_ST_HEADER, E_ST_NAMES, E_EMPTY)."""
    return map_tensors(path, where=where).check()


def read_header(stream: BinaryIO, *, where: str) -> TensorFile:
    """Check the header of a seekable stream, which the result keeps and reads from; raises as `open_tensors`."""
    size_bytes = stream.seek(0, 2)
    if size_bytes < 8:
        _refuse(where, "shorter than the 8 bytes of a header's length")
    return _check(stream, _header(stream, size_bytes, where=where), size_bytes, where=where)


def _header(source: BinaryIO | mmap.mmap, size_bytes: int, *, where: str) -> bytes:
    source.seek(0)
    num_header_bytes = int.from_bytes(source.read(8), "little")
    if num_header_bytes > MAX_HEADER_BYTES:
        _refuse(where, f"a header of {num_header_bytes:,} bytes is over the limit of {MAX_HEADER_BYTES:,}")
    if 8 + num_header_bytes > size_bytes:
        _refuse(where, f"the header says {num_header_bytes:,} bytes, the file has {size_bytes - 8:,} after it began")
    return source.read(num_header_bytes)


def _check(source: BinaryIO | mmap.mmap, header: bytes, size_bytes: int, *, where: str) -> TensorFile:
    document = _parse_header(header, where=where)
    metadata = _check_metadata(document.pop("__metadata__", {}), where=where)
    if not document:
        raise CheckFailed(f"{where}: holds no tensors", check="E_EMPTY", hint="the adapter was saved without weights")
    if len(document) > MAX_TENSORS:
        _refuse(where, f"{len(document):,} tensors are over the limit of {MAX_TENSORS:,}")
    data_start = 8 + len(header)
    entries = [_check_entry(name, value, data_start=data_start, where=where) for name, value in document.items()]
    entries.sort(key=lambda entry: entry.start)
    _check_contiguous(entries, data_start=data_start, size_bytes=size_bytes, where=where)
    return TensorFile(
        source,
        where=where,
        entries={entry.name: entry for entry in entries},
        metadata=metadata,
        size_bytes=size_bytes,
    )


def _parse_header(header: bytes, *, where: str) -> dict[str, Any]:
    if header[:1] != b"{":
        _refuse(where, "the header does not begin with '{'")
    if header.rstrip(b" ")[-1:] != b"}":
        _refuse(where, "the header does not end with '}' and spaces")
    num_objects = header.count(b"{")
    num_parts = header.count(b"[") + header.count(b",") + header.count(b":")
    # Text in the metadata may hold any of them.
    most_parts = min(_MAX_STRUCTURE, _MAX_STRUCTURE_OF_ONE * num_objects) + MAX_METADATA_BYTES
    if num_objects > 2 * MAX_TENSORS or num_parts > most_parts:
        _refuse(where, f"the header holds more than {MAX_TENSORS:,} tensors can need")
    try:
        document = json.loads(header.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise CheckFailed(f"{where}: broken header: {reason}", check="E_ST_HEADER") from error
    assert isinstance(document, dict)  # it begins with '{'
    return document


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {twice[:80]!r} appears twice")
    return document


def _no_constants(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_metadata(metadata: object, *, where: str) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(where, "__metadata__ is not a map of text to text")
    if sum(len(key) + len(value) for key, value in metadata.items()) > MAX_METADATA_BYTES:
        _refuse(where, f"__metadata__ is over the limit of {MAX_METADATA_BYTES:,} bytes")
    return metadata


def _check_entry(name: str, value: object, *, data_start: int, where: str) -> TensorEntry:
    if not _NAME.fullmatch(name) or ".." in name or len(name) > MAX_NAME_LENGTH:
        raise CheckFailed(
            f"{where}: {name[:80]!r} is not a tensor name",
            check="E_ST_NAMES",
            hint=f"A-Z a-z 0-9 _ . - without '..', at most {MAX_NAME_LENGTH} characters",
        )
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(where, f"{name}: not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        _refuse(where, f"{name}: unknown dtype {str(dtype)[:20]!r}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        _refuse(where, f"{name}: a shape is at most {MAX_DIMENSIONS} numbers from 0 on")
    if not _are_counts(offsets) or len(offsets) != 2:
        _refuse(where, f"{name}: data_offsets are not two numbers from 0 on")
    num_bytes = _DTYPES[dtype][0]
    for length in shape:
        num_bytes *= length  # Python's integers do not overflow
    if num_bytes == 0:
        raise CheckFailed(
            f"{where}: {name} has shape {list(shape)}: no values",
            check="E_EMPTY",
            hint="weights gathered from a sharded model were saved empty; gather them before saving",
        )
    if offsets[1] - offsets[0] != num_bytes:
        _refuse(where, f"{name}: {dtype} {list(shape)} needs {num_bytes:,} bytes, its offsets say otherwise")
    return TensorEntry(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_counts(value: object) -> bool:
    # `type` and not isinstance: True is an int; 2^63 is where other readers stop.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_contiguous(entries: list[TensorEntry], *, data_start: int, size_bytes: int, where: str) -> None:
    expected = data_start
    for entry in entries:
        if entry.start != expected:
            kind = "overlaps the tensor before it" if entry.start < expected else "leaves a hole before it"
            _refuse(where, f"{entry.name} {kind}")
        expected = entry.end
    if expected != size_bytes:
        kind = "ends early" if expected > size_bytes else "has bytes after its last tensor"
        _refuse(where, f"the file {kind}: tensors end at {expected:,}, the file at {size_bytes:,}")


def _refuse(where: str, reason: str) -> NoReturn:
    raise CheckFailed(f"{where}: {reason}", check="E_ST_HEADER")


def _as_float32(values: AnyArray, dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)
