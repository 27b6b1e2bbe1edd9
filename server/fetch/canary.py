"""Which callers of a channel try its canary. Knows no request and asks nobody."""

import hashlib
from typing import Literal

from loractl.hub.client_records import ResolvedCanary

Track = Literal["stable", "canary"]


def is_chosen(caller: str, canary: ResolvedCanary) -> bool:
    """Tell whether a caller gets the canary: always the same answer, and yes stays yes when the share grows."""
    # With the commit, so that not the same callers try every new version first.
    drawn = hashlib.sha256(f"{canary.adapter.repo_id}\0{canary.adapter.commit}\0{caller}".encode()).digest()
    return int.from_bytes(drawn[:8]) < canary.share * (1 << 64)
