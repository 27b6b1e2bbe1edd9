"""The control groups that this process runs in: where a container's limits stand. Knows no limit itself.

A container's limits do not show in the machine's own figures (cgroup v1 and v2).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Version = Literal[1, 2]


def control_groups(controller: str, root: Path) -> Iterator[tuple[Version, Path]]:
    """Yield this process's groups of a controller, inner ones first; `root` holds proc and sys.

    In a container a group's path may be the host's, of which only the mount is there.
    """
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            yield from _upwards(1, root / "sys/fs/cgroup" / controller, path)
        elif not controllers:
            yield from _upwards(2, root / "sys/fs/cgroup", path)


def _upwards(version: Version, mount: Path, path: str) -> Iterator[tuple[Version, Path]]:
    group = mount / path.lstrip("/")
    while True:
        yield version, group
        if group == mount or mount not in group.parents:
            return
        group = group.parent
