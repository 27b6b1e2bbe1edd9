"""Whose turn it is: virtual token counters per tenant, and per adapter within it. Knows keys, not requests."""

from collections.abc import Hashable


class FairShare:
    """Counts the tokens that each key was served, divided by its weight; the least served goes first.

    A key that comes back after idling starts level with the least served of those active: idling saves up nothing.
    """

    def __init__(self) -> None:
        self._served: dict[Hashable, float] = {}
        self._active: dict[Hashable, int] = {}
        self._floor = 0.0

    def enter(self, key: Hashable) -> None:
        """One more request of `key` is in the engine."""
        if key not in self._active:
            self._floor = self._least_active()
            self._served[key] = max(self._served.get(key, 0.0), self._floor)
            self._active[key] = 0
        self._active[key] += 1

    def leave(self, key: Hashable) -> None:
        """A request of `key` has ended."""
        self._active[key] -= 1
        if self._active[key] == 0:
            self._floor = self._least_active()
            del self._active[key]
            # A key that is ahead must not lose its debt by pausing; one at the floor need not be remembered.
            if self._served[key] <= self._floor:
                del self._served[key]
            self._forget_settled()

    def charge(self, key: Hashable, num_tokens: float, *, weight: float = 1.0) -> None:
        """`key` was served `num_tokens`; a weight of 2 makes them count half."""
        self._served[key] = self._served.get(key, 0.0) + num_tokens / weight

    def served(self, key: Hashable) -> float:
        """Virtual tokens of `key`: what to order by."""
        return self._served.get(key, self._floor)

    def _least_active(self) -> float:
        return min((self._served[key] for key in self._active), default=self._floor)

    def _forget_settled(self) -> None:
        if len(self._served) > 4 * len(self._active) + 64:
            settled = [k for k, served in self._served.items() if k not in self._active and served <= self._floor]
            for key in settled:
                del self._served[key]
            if not self._active:
                self._served.clear()
                self._floor = 0.0
