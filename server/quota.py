"""How much one key or adapter may take: requests and tokens a minute, requests at a time. Knows no HTTP, no engine."""

import contextlib
import time
from collections.abc import Callable, Iterator

from loractl.adapters.errors import RateLimited
from loractl.server.access import Key


class Bucket:
    """Fills at a steady rate up to one minute's worth; may go below zero, and then nothing passes until it is paid."""

    def __init__(self, per_minute: float, clock: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._level = per_minute
        self._at = clock()

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` is there; 0 when it is."""
        now = self._clock()
        self._level = min(self._per_minute, self._level + (now - self._at) * self._per_minute / 60)
        self._at = now
        # More than a minute's worth never gathers: it passes on a full bucket, and is paid for afterwards.
        missing = min(amount, self._per_minute) - self._level
        return max(0.0, missing * 60 / self._per_minute)

    def take(self, amount: float) -> None:
        self._level -= amount


class Quotas:
    """The books of all keys that have limits; a key without limits is never entered."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # By tenant and rate: a rate that is changed in the keys file begins a bucket of its own.
        self._requests: dict[tuple[str, float], Bucket] = {}
        self._tokens: dict[tuple[str, float], Bucket] = {}
        self._running: dict[str, int] = {}

    @contextlib.contextmanager
    def admit(self, key: Key) -> Iterator[None]:
        """Book one request while the context is open; raises RateLimited, with the time to wait, above a limit."""
        running = self._running.get(key.tenant, 0)
        if key.max_concurrent is not None and running >= key.max_concurrent:
            raise RateLimited(f"{key.what} may run {key.max_concurrent} requests at a time", retry_after_s=1)
        if key.requests_per_minute is not None:
            bucket = _bucket(self._requests, key.tenant, key.requests_per_minute, self._clock)
            if (wait_s := bucket.wait_s(1)) > 0:
                raise RateLimited(
                    f"{key.what} may ask {key.requests_per_minute:g} times a minute", retry_after_s=wait_s
                )
            bucket.take(1)
        self._running[key.tenant] = running + 1
        try:
            yield
        finally:
            self.release(key)

    def hold(self, key: Key) -> None:
        """Count a stream that outlives its `admit`; pair it with `release`."""
        self._running[key.tenant] = self._running.get(key.tenant, 0) + 1

    def release(self, key: Key) -> None:
        left = self._running[key.tenant] - 1
        if left:
            self._running[key.tenant] = left
        else:
            del self._running[key.tenant]

    def take_tokens(self, key: Key, num_tokens: int) -> None:
        """Book a request's prompt and most output; raises RateLimited when the key's minute is used up."""
        if key.tokens_per_minute is None:
            return
        bucket = _bucket(self._tokens, key.tenant, key.tokens_per_minute, self._clock)
        if (wait_s := bucket.wait_s(num_tokens)) > 0:
            raise RateLimited(f"{key.what} may use {key.tokens_per_minute:g} tokens a minute", retry_after_s=wait_s)
        bucket.take(num_tokens)


def _bucket(
    buckets: dict[tuple[str, float], Bucket], tenant: str, per_minute: float, clock: Callable[[], float]
) -> Bucket:
    return buckets.setdefault((tenant, per_minute), Bucket(per_minute, clock))
