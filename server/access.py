"""Who may ask, and for what: keys from a file, compared without telling how far they matched. Knows no HTTP.

One key a line: `KEY [TENANT] [admin] [weight=N]`; `#` starts a comment. Only hashes are kept in memory.
"""

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path

from loractl.adapters.errors import BadData, NotAllowed, Unauthenticated

MIN_KEY_CHARS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What a key is good for; `tenant` names whose share of the engine it uses."""

    tenant: str = ""
    is_admin: bool = False
    weight: float = 1.0


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
    tenant, is_admin, weight = "", False, 1.0
    for word in words[1:]:
        if word == "admin":
            is_admin = True
        elif word.startswith("weight="):
            try:
                weight = float(word.removeprefix("weight="))
            except ValueError as error:
                raise BadData(f"{where}: {word!r} is not a number") from error
            if not 0 < weight <= 1000:
                raise BadData(f"{where}: a weight lies between 0 and 1000")
        elif not tenant and "=" not in word:
            tenant = word
        else:
            raise BadData(f"{where}: cannot read {word!r}", hint="KEY [TENANT] [admin] [weight=N]")
    # Two keys without a tenant must not share a prefix cache.
    return Key(tenant=tenant or _hash(words[0]).hex()[:16], is_admin=is_admin, weight=weight)
