"""Named places where a drill may kill the process. Does nothing unless `LORACTL_HUB_FAILPOINT` names one."""

import os
import signal

_ARMED = os.environ.get("LORACTL_HUB_FAILPOINT")


def reach(name: str) -> None:
    """Die here, as a power cut would, when this point is armed."""
    if name == _ARMED:
        os.kill(os.getpid(), signal.SIGKILL)
