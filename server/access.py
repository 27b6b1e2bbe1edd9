"""Who may ask, and for what: keys from a file, compared without telling how far they matched. Knows no HTTP.

One key a line: `KEY [TENANT] [admin] [weight=N] [requests=N] [tokens=N] [concurrent=N]`, limits per minute and tenant;
`#` starts a comment. Only hashes are kept in memory.
"""

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path

from loractl.adapters.errors import BadData, NotAllowed, Unauthenticated

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


EVERYBODY = Key(is_admin=True)
"""The caller of a server without keys, which listens on loopback only."""


class Access:
    """Checks keys; without any, everybody on this machine may do everything."""

    def __init__(self, keys: dict[bytes, Key] | None = None) -> None:
        self._keys = keys or {}

    @property
    def is_open(self) -> bool:
        return not self._keys

    @classmethod
    def from_file(cls, path: Path) -> "Access":
        """Read a keys file; raises BadData with file and line, never with the key."""
        keys: dict[bytes, Key] = {}
        try:
            lines = path.read_text().splitlines()
        except OSError as error:
            raise BadData(f"{path}: {error.strerror}", hint="give a readable file with one key a line") from error
        for number, line in enumerate(lines, start=1):
            words = line.partition("#")[0].split()
            if words:
                keys[_hash(words[0])] = _parse(words, where=f"{path}:{number}")
        if not keys:
            raise BadData(f"{path}: holds no key", hint="write one key a line, at least 16 characters each")
        return cls(keys)

    def check(self, authorization: str | None) -> Key:
        """Give the key of an `Authorization: Bearer` header; raises Unauthenticated."""
        if self.is_open:
            return EVERYBODY
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret:
            raise Unauthenticated("this server wants an API key", hint="send `Authorization: Bearer KEY`")
        wanted = _hash(secret.strip())
        for known, key in self._keys.items():
            if hmac.compare_digest(known, wanted):
                return key
        raise Unauthenticated("this API key is not known here")

    def check_admin(self, authorization: str | None) -> Key:
        """As `check`, for the routes that change the server."""
        key = self.check(authorization)
        if not key.is_admin:
            raise NotAllowed("this key has no admin right")
        return key


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _parse(words: list[str], *, where: str) -> Key:
    if len(words[0]) < MIN_KEY_CHARS:
        raise BadData(f"{where}: a key has at least {MIN_KEY_CHARS} characters")
    tenant, is_admin = "", False
    numbers: dict[str, float] = {}
    for word in words[1:]:
        name, equals, value = word.partition("=")
        if word == "admin":
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
