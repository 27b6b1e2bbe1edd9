"""Plays the record of a disk (see dropping_disk.c) up to a power cut, and leaves out what was not fsynced.

What a file's fsync covered is there; of its later writes any may be there, whole or torn at a sector, or none. An entry
of a folder (a file made, renamed or removed) is as it was when the folder was last fsynced, or as at any time since.
"""

import random
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).with_name("dropping_disk.c")
SECTOR_BYTES = 512
ACKS = "acks"
_HEAD = struct.Struct("<cIIQQ")


@dataclass(frozen=True, slots=True)
class Step:
    """One deed: `kind` as in dropping_disk.c."""

    kind: str
    path: str
    target: str
    offset: int
    data: bytes


@dataclass(slots=True)
class _File:
    """A file's writes and cuts in order, of which the first `num_synced` are on the disk."""

    changes: list[Step] = field(default_factory=list[Step])
    num_synced: int = 0

    def content(self, chance: random.Random, keep: float) -> bytes:
        data = bytearray()
        for number, step in enumerate(self.changes):
            is_synced = number < self.num_synced
            if not is_synced and chance.random() >= keep:
                continue
            if step.kind == "t":
                data = data[: step.offset] + bytes(max(0, step.offset - len(data)))
                continue
            piece = step.data
            if not is_synced and chance.random() < 0.5:
                piece = piece[: chance.randrange(len(piece) + 1) // SECTOR_BYTES * SECTOR_BYTES]
            data += bytes(max(0, step.offset - len(data)))
            data[step.offset : step.offset + len(piece)] = piece
        return bytes(data)


@dataclass(slots=True)
class _Entry:
    """What a name in a folder has meant, oldest first; from `first_durable` on any may be on the disk."""

    meanings: list["_File | str | None"] = field(default_factory=lambda: [None])
    first_durable: int = 0


class Disk:
    """The disk under a program, as the record tells."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self.acks = b""

    def play(self, step: Step) -> None:
        if step.path == ACKS:
            self.acks += step.data
            return
        match step.kind:
            case "c":
                self._set(step.path, _File())
            case "d":
                self._set(step.path, "folder")
            case "u" | "m":
                self._set(step.path, None)
            case "r":
                self._set(step.target, self._now(step.path))
                self._set(step.path, None)
            case "s":
                self._sync(step.path)
            case _:
                found = self._now(step.path)
                if isinstance(found, _File):
                    found.changes.append(step)

    def materialise(self, root: Path, chance: random.Random, *, keep: float) -> None:
        """Write what may be found after a cut now; `keep`: how likely anything that was not fsynced is there."""
        root.mkdir(parents=True)
        for path, entry in sorted(self._entries.items()):
            last = entry.first_durable
            while last + 1 < len(entry.meanings) and chance.random() < keep:
                last += 1
            meaning = entry.meanings[last]
            # The index of the write-ahead log lives in memory only; SQLite makes it anew.
            if meaning is None or path.endswith("-shm") or not (root / path).parent.is_dir():
                continue
            if isinstance(meaning, _File):
                (root / path).write_bytes(meaning.content(chance, keep))
            else:
                (root / path).mkdir()

    def _now(self, path: str) -> "_File | str | None":
        return self._entries.get(path, _Entry()).meanings[-1]

    def _set(self, path: str, meaning: "_File | str | None") -> None:
        self._entries.setdefault(path, _Entry()).meanings.append(meaning)

    def _sync(self, path: str) -> None:
        found = self._now(path)
        if isinstance(found, _File):
            found.num_synced = len(found.changes)
            return
        for name, entry in self._entries.items():
            if (name.rpartition("/")[0] or ".") == path:
                entry.first_durable = len(entry.meanings) - 1


def build_shim(folder: Path) -> Path:
    """Compile the recorder; raises CalledProcessError with the compiler's words."""
    made = folder / "dropping_disk.so"
    subprocess.run(
        ["cc", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(made), "-ldl", "-lpthread"],
        check=True,
        capture_output=True,
    )
    return made


def read_record(path: Path) -> list[Step]:
    data = path.read_bytes()
    steps: list[Step] = []
    position = 0
    while position < len(data):
        kind, num_path, num_target, offset, num_data = _HEAD.unpack_from(data, position)
        position += _HEAD.size
        ends = [position + num_path, position + num_path + num_target, position + num_path + num_target + num_data]
        path_text, target = data[position : ends[0]].decode(), data[ends[0] : ends[1]].decode()
        steps.append(Step(kind.decode(), path_text, target, offset, data[ends[1] : ends[2]]))
        position = ends[2]
    return steps
