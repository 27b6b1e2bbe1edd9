"""Asks the hub whether a caller's own token is good, and for which adapters. Believes an answer for a minute at most.

Knows tokens only as what it passes on; keeps their hashes. Refuses to know routes and quotas.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import quote

import httpx

from loractl.adapters.errors import Overloaded, Unreachable

_REFUSED = {400, 401, 403, 404}


@dataclass(frozen=True, slots=True)
class _Verdict:
    value: str | None
    at: float


class HubCallers:
    """Verdicts of one hub about callers' tokens, cached; safe for one event loop."""

    def __init__(
        self,
        url: str,
        *,
        fresh_s: float = 30.0,
        usable_s: float = 60.0,
        timeout_s: float = 0.9,
        max_known: int = 20_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url.rstrip("/")
        self._fresh_s = fresh_s
        self._usable_s = usable_s
        self._timeout_s = timeout_s
        self._max_known = max_known
        self._clock = clock
        self._known: OrderedDict[tuple[bytes, str], _Verdict] = OrderedDict()
        self._http: httpx.AsyncClient | None = None
        self._places = asyncio.Semaphore(32)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        if self._http is not None:
            await self._http.aclose()

    async def name_of(self, secret: str) -> str | None:
        """Give the hub's id of a token; None when the hub does not know it, or not any more."""
        return await self._ask(secret, "/api/whoami-v2", lambda body: str(body.get("id") or body.get("name")))

    async def may_read(self, secret: str, repo_id: str) -> bool:
        """Tell whether a token's bearer may read a repo; absent and forbidden are the same."""
        path = f"/api/models/{quote(repo_id)}/auth-check"
        return await self._ask(secret, path, lambda body: "yes") is not None

    async def _ask(self, secret: str, path: str, read: Callable[[dict[str, Any]], str]) -> str | None:
        key = (hashlib.sha256(secret.encode()).digest(), path)
        known, now = self._known.get(key), self._clock()
        if known is not None and now - known.at <= self._fresh_s:
            return known.value
        try:
            response = await self._get(path, secret)
        except Unreachable:
            # A hub that is away for a moment changes nobody's rights; after that, nobody is believed.
            if known is not None and now - known.at <= self._usable_s:
                return known.value
            raise
        value = None if response.status_code in _REFUSED else read(response.json())
        self._known[key] = _Verdict(value, now)
        self._known.move_to_end(key)
        while len(self._known) > self._max_known:
            self._known.popitem(last=False)
        return value

    async def _get(self, path: str, secret: str) -> httpx.Response:
        if self._http is None:
            self._http = httpx.AsyncClient(base_url=self._url, timeout=self._timeout_s)
        if self._places.locked():
            raise Overloaded("too many keys are being checked with the hub", retry_after_s=1)
        async with self._places:
            try:
                response = await self._http.get(path, headers={"authorization": f"Bearer {secret}"})
            except (httpx.HTTPError, UnicodeEncodeError) as error:
                raise self._away() from error
        if response.is_success or response.status_code in _REFUSED:
            return response
        raise self._away()

    @staticmethod
    def _away() -> Unreachable:
        return Unreachable(
            "the hub, which knows who may ask, does not answer", hint="try again soon", retry_after_s=2.0
        )
