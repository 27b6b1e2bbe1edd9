"""A circuit breaker: after some failures in a row it says "do not ask" for a while, so that callers need not wait.

Knows nothing of what it protects.
"""

import time
from collections.abc import Callable


class Breaker:
    """Counts failures in a row. Open for `open_s` after `limit` of them, then lets one trial through at a time."""

    def __init__(self, *, limit: int = 3, open_s: float = 2.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._open_s = open_s
        self._clock = clock
        self._failures = 0
        self._opens_again_at = 0.0

    @property
    def is_closed(self) -> bool:
        return self._failures < self._limit

    def seconds_to_wait(self) -> float:
        """0 when the protected thing may be asked; asking while open books the one trial."""
        if self.is_closed:
            return 0.0
        now = self._clock()
        if now < self._opens_again_at:
            return self._opens_again_at - now
        self._opens_again_at = now + self._open_s
        return 0.0

    def succeeded(self) -> None:
        self._failures = 0

    def failed(self) -> None:
        self._failures += 1
        if self._failures >= self._limit:
            self._opens_again_at = self._clock() + self._open_s
