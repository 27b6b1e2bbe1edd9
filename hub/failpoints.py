"""Named places where a drill may kill the process. Does nothing unless `LORACTL_HUB_FAILPOINT` names one.

`name` dies there at once, `name:3` when it is reached for the third time.
"""

import itertools
import os
import signal


def reach(name: str) -> None:
    """Die here, as a power cut would, when this point is armed."""
    if name == _armed and next(_times) == _at:
        os.kill(os.getpid(), signal.SIGKILL)


def arm(place: str | None) -> None:
    """Choose the point, as `LORACTL_HUB_FAILPOINT` does at the start; None: none."""
    global _armed, _at, _times
    name, _, times = (place or "").partition(":")
    _armed, _at, _times = name or None, int(times or 1), itertools.count(1)


_armed: str | None = None
_at = 1
_times = itertools.count(1)
arm(os.environ.get("LORACTL_HUB_FAILPOINT"))
