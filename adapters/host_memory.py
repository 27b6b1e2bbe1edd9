"""What memory a process may still take: the machine's, or its container's where that is less. Knows no models."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loractl.adapters.byte_sizes import memory_size
from loractl.adapters.control_groups import control_groups


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Bytes that can still be taken, and what says so."""

    size_bytes: int
    limit: str


@dataclass(frozen=True, slots=True)
class _Files:
    """A control group's files: its limit, its use, and the name of the page cache that the kernel gives back first."""

    limit: str
    usage: str
    reclaimable: str


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("memory.max", "memory.current", "inactive_file")


def free_memory(root: Path = Path("/")) -> FreeMemory:
    """The least of what the machine and each control group above this process leave free; `root` holds proc and sys."""
    return min((_machine(root), *_control_groups(root)), key=lambda free: free.size_bytes)


def _machine(root: Path) -> FreeMemory:
    path = root / "proc/meminfo"
    for line in path.read_text().splitlines() if path.is_file() else ():
        if line.startswith("MemAvailable:"):
            return FreeMemory(int(line.split()[1]) * 1024, "the machine's free memory")
    # Other systems do not say what is free in one place.
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return FreeMemory(whole // 2, "half of the machine's memory")


def _control_groups(root: Path) -> Iterator[FreeMemory]:
    for version, group in control_groups("memory", root):
        free = _free_of(group, _V1 if version == 1 else _V2)
        if free is not None:
            yield free


def _free_of(group: Path, files: _Files) -> FreeMemory | None:
    try:
        limit = (group / files.limit).read_text().strip()
        usage = int((group / files.usage).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:  # no such group here, or no limits at the root of v2
        return None
    if limit == "max":
        return None
    used = usage - int(stat.get(files.reclaimable, 0))
    return FreeMemory(max(0, int(limit) - used), f"the container's {files.limit} of {memory_size(int(limit))}")
