"""How many processors this process may keep busy: the machine's, or its container's share. Knows no models.

Where more threads compute than may run, each waits for the one that the kernel holds back, and a step takes many times
its time.
"""

import os
from pathlib import Path

from loractl.adapters.control_groups import Version, control_groups


def usable_processors(root: Path = Path("/")) -> int:
    """Return how many may be kept busy, whole ones and at least 1; `root` holds proc and sys."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = (_quota(version, group) for version, group in control_groups("cpu", root))
    return max(1, int(min([allowed, *(quota for quota in quotas if quota is not None)])))


def keep_threads_to_processors() -> None:
    """Let torch compute on as many threads as processors may be used at most; OMP_NUM_THREADS counts over it."""
    import torch

    usable = usable_processors()
    if "OMP_NUM_THREADS" not in os.environ and usable < torch.get_num_threads():
        torch.set_num_threads(usable)


def _quota(version: Version, group: Path) -> float | None:
    """Processors' time a group may use, in processors; None for no limit."""
    try:
        if version == 2:
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except OSError:  # no such group here, or no limits at the root of v2
        return None
    return None if quota in {"max", "-1"} else int(quota) / int(period)
