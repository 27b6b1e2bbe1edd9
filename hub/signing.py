"""Addresses and tokens that carry their own permission: signed, expiring, good for one thing. Knows no route."""

import hmac
import secrets
import time
from base64 import urlsafe_b64encode
from hashlib import sha256

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite

from loractl.adapters.errors import NotAllowed
from loractl.hub import tables
from loractl.hub.database import Database

_KEY_NAME = "signing"
_KEY_BYTES = 32


async def load_signer(database: Database) -> "Signer":
    """Read the hub's signing key, making it at the first start; all processes of one hub share it."""
    async with database.write() as connection:
        dialect = sqlite if database.is_sqlite else postgresql
        values = {"name": _KEY_NAME, "value": secrets.token_bytes(_KEY_BYTES)}
        await connection.execute(dialect.insert(tables.secret).values(**values).on_conflict_do_nothing())
        table = tables.secret
        row = await connection.execute(select(table.c.value).where(table.c.name == _KEY_NAME))
        return Signer(row.scalar_one())


class Signer:
    """Signs and checks tuples of words."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def sign(self, *words: object, expires_at: float) -> str:
        """A signature over the words and the time at which it ends."""
        expiry = int(expires_at)
        return f"{expiry}.{self._mac(words, expiry)}"

    def check(self, signature: str, *words: object) -> None:
        """Raise NotAllowed unless `signature` was made for exactly these words and has not expired."""
        expiry, _, mac = signature.partition(".")
        if not expiry.isascii() or not expiry.isdigit() or len(expiry) > 12:
            raise NotAllowed("the address is not signed", hint="ask the hub for a new upload address")
        if not hmac.compare_digest(mac.encode(), self._mac(words, int(expiry)).encode()):
            raise NotAllowed("the address was signed for something else", hint="ask the hub for a new upload address")
        if int(expiry) < time.time():
            raise NotAllowed("the address has expired", hint="ask the hub for a new upload address")

    def _mac(self, words: tuple[object, ...], expiry: int) -> str:
        # Lengths before the words, so that no two lists of words read the same.
        text = "".join(f"{len(str(word))}:{word}" for word in (*words, expiry))
        return urlsafe_b64encode(hmac.digest(self._key, text.encode(), sha256)).decode().rstrip("=")
