"""Remembers requests that broke steps, so that one who asks again and again does not cost its neighbours each time."""

import time
from collections import OrderedDict

from loractl.adapters.errors import EngineFailure
from loractl.server.engine.messages import Submit
from loractl.server.engine.sequence import fingerprint

_MAX_FAILURES = 2
_KEPT_S = 300.0
_MAX_KEPT = 1024


class Quarantine:
    """Counts failures by prompt and adapters; the caller keeps two threads from it at once."""

    def __init__(self) -> None:
        self._failures: OrderedDict[bytes, tuple[int, float]] = OrderedDict()

    def note(self, request: Submit) -> None:
        """This request broke a step."""
        key = fingerprint(request)
        count, _ = self._failures.pop(key, (0, 0.0))
        self._failures[key] = count + 1, time.monotonic()
        if len(self._failures) > _MAX_KEPT:
            self._failures.popitem(last=False)

    @property
    def num_refused(self) -> int:
        """Requests that `check` refuses now."""
        since = time.monotonic() - _KEPT_S
        return sum(count >= _MAX_FAILURES and last_at > since for count, last_at in self._failures.values())

    def check(self, request: Submit) -> None:
        """Raise EngineFailure for a request whose like has broken several steps of the last minutes."""
        if not self._failures:
            return
        key = fingerprint(request)
        count, last_at = self._failures.get(key, (0, 0.0))
        if time.monotonic() - last_at > _KEPT_S:
            self._failures.pop(key, None)
        elif count >= _MAX_FAILURES:
            raise EngineFailure(
                f"this prompt has failed {count} times with this adapter",
                hint="another prompt or adapter is served; the server's log says what failed",
            )
