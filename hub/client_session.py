"""How huggingface_hub behaves inside our commands: no endless waiting, no bars into logs. Sends nothing."""

import os
import sys

_TRANSFER_TIMEOUT_S = 60.0


def prepare_huggingface() -> None:
    """Bound its requests, whose default waits for a silent hub for ever, and keep it quiet where nobody watches."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils.tqdm import disable_progress_bars

    get_session().timeout = _TRANSFER_TIMEOUT_S
    # Classic LFS: one plain stream that the hub hashes as it comes, nothing packed, and no weights when it has them.
    constants.HF_HUB_DISABLE_XET = True
    # Who sets the variable has decided, and the call would warn.
    if not sys.stderr.isatty() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        disable_progress_bars()
