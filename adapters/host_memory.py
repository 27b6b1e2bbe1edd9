"""How much memory this process may still take: the machine's, or its container's where that is less. Knows no models.

A container's limit stands in its control group (cgroup v1 or v2); the machine's own figures do not show it.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


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
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield from _limits(root / "sys/fs/cgroup/memory", path, _V1)
        elif not controllers:
            yield from _limits(root / "sys/fs/cgroup", path, _V2)


def _limits(mount: Path, path: str, files: _Files) -> Iterator[FreeMemory]:
    """Limits of a group and of those above it; in a container the path may be the host's, and only the mount is
    there."""
    group = mount / path.lstrip("/")
    while True:
        free = _free_of(group, files)
        if free is not None:
            yield free
        if group == mount or mount not in group.parents:
            return
        group = group.parent


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
    return FreeMemory(max(0, int(limit) - used), f"the container's {files.limit} of {int(limit) / 2**30:.1f} GiB")
