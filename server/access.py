"""Who may ask, and for what: keys from a file, compared in constant time, or callers' hub tokens. Knows no HTTP.

One key a line: `KEY [TENANT] [admin] [weight=N] [requests=N] [tokens=N] [concurrent=N] [adapters=PATTERN,...]`, limits
per minute and tenant; `#` starts a comment. Only hashes are kept in memory. The file is read again when it changes.
"""

import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from loractl.adapters.errors import BadData, NotAllowed, Unauthenticated
from loractl.server.hub_callers import HubCallers

_log = logging.getLogger("loractl.server")

MIN_KEY_CHARS = 16
_NUMBERS: dict[str, tuple[float, float]] = {
    "weight": (0.001, 1000),
    "requests": (1, 1e9),
    "tokens": (1, 1e12),
    "concurrent": (1, 1e6),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What a key is good for; `tenant` names whose share of the engine it uses."""

    tenant: str = ""
    is_admin: bool = False
    weight: float = 1.0
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_concurrent: int | None = None
    adapters: tuple[str, ...] = ("*",)
    """Patterns of the adapters that it may use, such as `team/*`."""
    hub_secret: str | None = field(default=None, repr=False)
    """Set for a caller whose rights the hub knows."""
    what: str = "this key"


EVERYBODY = Key(is_admin=True)
"""The caller of a server without keys, which listens on loopback only."""


class Access:
    """Checks keys; without any, everybody on this machine may do everything."""

    def __init__(
        self,
        keys: dict[bytes, Key] | None = None,
        *,
        callers: HubCallers | None = None,
        file: "KeysFile | None" = None,
    ) -> None:
        self._keys = keys or {}
        self._callers = callers
        self._file = file

    @property
    def is_open(self) -> bool:
        return not self._keys and self._callers is None

    @classmethod
    def from_file(cls, path: Path, *, callers: HubCallers | None = None) -> "Access":
        """Read a keys file; raises BadData with file and line, never with the key."""
        file = KeysFile(path)
        return cls(file.read(), callers=callers, file=file)

    async def close(self) -> None:
        if self._callers is not None:
            await self._callers.close()

    async def check(self, authorization: str | None) -> Key:
        """Give the key of an `Authorization: Bearer` header; raises Unauthenticated."""
        if self.is_open:
            return EVERYBODY
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret:
            raise Unauthenticated("this server wants an API key", hint="send `Authorization: Bearer KEY`")
        if self._file is not None and (changed := self._file.read_if_changed()) is not None:
            self._keys = changed
        wanted = _hash(secret.strip())
        for known, key in self._keys.items():
            if hmac.compare_digest(known, wanted):
                return key
        if self._callers is not None and (name := await self._callers.name_of(secret.strip())) is not None:
            return Key(tenant=f"hub:{name}", hub_secret=secret.strip())
        raise Unauthenticated("this API key is not known here")

    async def may_use(self, key: Key, name: str) -> bool:
        """Tell whether a key may use an adapter: a hub's repo id, or a name given at the start."""
        if not any(fnmatchcase(name, pattern) for pattern in key.adapters):
            return False
        if key.hub_secret is None or self._callers is None or "/" not in name:
            return True
        return await self._callers.may_read(key.hub_secret, name)

    async def check_admin(self, authorization: str | None) -> Key:
        """As `check`, for the routes that change the server."""
        key = await self.check(authorization)
        if not key.is_admin:
            raise NotAllowed("this key has no admin right")
        return key


class KeysFile:
    """A file of keys that may change while the server runs: a key that is taken out of it is refused within seconds."""

    def __init__(self, path: Path, *, every_s: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._every_s = every_s
        self._clock = clock
        self._looked_at = clock()
        self._seen: tuple[int, int, int] | None = None

    def read(self) -> dict[bytes, Key]:
        """All keys by their hash; raises BadData."""
        keys: dict[bytes, Key] = {}
        try:
            self._seen = self._mark()
            lines = self._path.read_text().splitlines()
        except OSError as error:
            raise BadData(f"{self._path}: {error.strerror}", hint="give a readable file with one key a line") from error
        for number, line in enumerate(lines, start=1):
            words = line.partition("#")[0].split()
            if words:
                keys[_hash(words[0])] = _parse(words, where=f"{self._path}:{number}")
        if not keys:
            raise BadData(f"{self._path}: holds no key", hint="write one key a line, at least 16 characters each")
        return keys

    def read_if_changed(self) -> dict[bytes, Key] | None:
        """The keys when the file is another than before, looked at every few seconds; a bad file changes nothing."""
        now = self._clock()
        if now - self._looked_at < self._every_s:
            return None
        self._looked_at = now
        try:
            if self._mark() == self._seen:
                return None
            keys = self.read()
        except (OSError, BadData) as error:
            _log.error("the keys file cannot be read, the keys from before stay: %s", error)
            return None
        _log.info("the keys file was read again: %d keys", len(keys))
        return keys

    def _mark(self) -> tuple[int, int, int]:
        # Kubernetes replaces a mounted secret by another file with the same name.
        found = self._path.stat()
        return found.st_ino, found.st_mtime_ns, found.st_size


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _parse(words: list[str], *, where: str) -> Key:
    if len(words[0]) < MIN_KEY_CHARS:
        raise BadData(f"{where}: a key has at least {MIN_KEY_CHARS} characters")
    tenant, is_admin = "", False
    patterns: tuple[str, ...] = ("*",)
    numbers: dict[str, float] = {}
    for word in words[1:]:
        name, equals, value = word.partition("=")
        if equals and name == "adapters" and value:
            patterns = tuple(value.split(","))
        elif word == "admin":
            is_admin = True
        elif equals and name in _NUMBERS:
            numbers[name] = _number(value, name, where=where)
        elif not tenant and not equals:
            tenant = word
        else:
            raise BadData(f"{where}: cannot read {word!r}", hint="KEY [TENANT] [admin] [weight=N] [requests=N] ...")
    return Key(
        # Two keys without a tenant must not share a prefix cache.
        tenant=tenant or _hash(words[0]).hex()[:16],
        is_admin=is_admin,
        adapters=patterns,
        weight=numbers.get("weight", 1.0),
        requests_per_minute=numbers.get("requests"),
        tokens_per_minute=numbers.get("tokens"),
        max_concurrent=int(numbers["concurrent"]) if "concurrent" in numbers else None,
    )


def _number(value: str, name: str, *, where: str) -> float:
    try:
        number = float(value)
    except ValueError as error:
        raise BadData(f"{where}: {name}={value!r} is not a number") from error
    low, high = _NUMBERS[name]
    if not low <= number <= high:
        raise BadData(f"{where}: {name} lies between {low:g} and {high:g}")
    return number
