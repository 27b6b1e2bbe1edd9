"""Tokens: made, shown once, kept as hashes, found again by their hash. Knows no route."""

import hashlib
import secrets
import time

from sqlalchemy import ColumnElement, insert, or_, select, update

from loractl.adapters.errors import NotFound, Unauthenticated
from loractl.hub import tables
from loractl.hub.actor import Actor, anonymous
from loractl.hub.database import Database
from loractl.hub.moments import iso, iso_or_none
from loractl.hub.registry.journal import emit, record
from loractl.hub.wire import TokenCreate, TokenCreated, TokenRole, TokenView

SECRET_PREFIX = "lch_"  # noqa: S105
_CACHE_S = 2.0
_CACHE_SIZE = 4096
_LAST_USED_EVERY_S = 60.0


class Tokens:
    """Issues and recognises tokens. An answer may be `_CACHE_S` old, so a revocation elsewhere takes that long."""

    def __init__(self, database: Database, *, anonymous_read: bool) -> None:
        self._database = database
        self._anonymous_read = anonymous_read
        self._cache: dict[str, tuple[float, Actor | None]] = {}
        self._used_at: dict[str, float] = {}

    async def authenticate(self, secret: str | None, *, request_id: str) -> Actor:
        """Find who holds `secret`; raises Unauthenticated for one that is unknown, expired or revoked."""
        if secret is None:
            return anonymous(may_read=self._anonymous_read, request_id=request_id)
        found = await self._recent(tables.token.c.secret_sha256, _hash(secret))
        if found is None:
            raise Unauthenticated(
                "Invalid credentials in Authorization header", hint="the token is unknown, expired or revoked"
            )
        await self._note_use(found)
        return Actor(found.token_id, found.name, found.roles, found.pattern, request_id)

    async def holder(self, token_id: str, *, request_id: str) -> Actor | None:
        """Find the holder of a token by its id, for who has proved already to hold it; None when it has ended."""
        found = await self._recent(tables.token.c.id, token_id)
        return None if found is None else Actor(found.token_id, found.name, found.roles, found.pattern, request_id)

    async def _recent(self, column: "ColumnElement[str]", value: str) -> Actor | None:
        """Whose token has this value, as it was at most `_CACHE_S` ago."""
        known = self._cache.get(value)
        if known is None or known[0] < time.monotonic():
            known = (time.monotonic() + _CACHE_S, await self._find(column == value))
            if len(self._cache) >= _CACHE_SIZE:
                self._cache.clear()
            self._cache[value] = known
        return known[1]

    async def _find(self, condition: "ColumnElement[bool]") -> Actor | None:
        table = tables.token
        async with self._database.read() as connection:
            row = (await connection.execute(select(table).where(condition))).first()
        if row is None or row.revoked_at is not None or (row.expires_at is not None and row.expires_at <= time.time()):
            return None
        return Actor(row.id, row.name, frozenset(row.roles.split(",")), row.pattern)

    async def _note_use(self, actor: Actor) -> None:
        token_id = actor.token_id or ""
        if self._used_at.get(token_id, 0.0) > time.monotonic() - _LAST_USED_EVERY_S:
            return
        self._used_at[token_id] = time.monotonic()
        async with self._database.write() as connection:
            table = tables.token
            await connection.execute(update(table).where(table.c.id == token_id).values(last_used_at=time.time()))

    async def create(self, wanted: TokenCreate, *, actor: Actor) -> TokenCreated:
        """Make a token; its secret is in the answer and nowhere else."""
        secret = SECRET_PREFIX + secrets.token_urlsafe(32)
        created_at = time.time()
        lifetime_s = None if wanted.expires_in_days is None else wanted.expires_in_days * 86400.0
        values = {
            "id": secrets.token_hex(6),
            "secret_sha256": _hash(secret),
            "last4": secret[-4:],
            "name": wanted.name,
            "roles": ",".join(dict.fromkeys(wanted.roles)),
            "pattern": wanted.pattern,
            "created_at": created_at,
            "expires_at": None if lifetime_s is None else created_at + lifetime_s,
        }
        async with self._database.write() as connection:
            row = (await connection.execute(insert(tables.token).values(**values).returning(tables.token))).one()
            await record(
                connection,
                actor,
                "token.create",
                target=row.id,
                detail={"name": row.name, "roles": row.roles, "pattern": row.pattern},
            )
            await emit(connection, "token.created", None, {"id": row.id, "name": row.name})
        return TokenCreated(token=_view(row), secret=secret)

    async def list_all(self) -> list[TokenView]:
        table = tables.token
        async with self._database.read() as connection:
            rows = (await connection.execute(select(table).order_by(table.c.created_at.desc()))).all()
        return [_view(row) for row in rows]

    async def revoke(self, token_id: str, *, actor: Actor) -> TokenView:
        """End a token now; raises NotFound. A second time changes nothing."""
        table = tables.token
        async with self._database.write() as connection:
            await connection.execute(
                update(table).where(table.c.id == token_id, table.c.revoked_at.is_(None)).values(revoked_at=time.time())
            )
            row = (await connection.execute(select(table).where(table.c.id == token_id))).first()
            if row is None:
                raise NotFound(f"no token {token_id}", hint="`loractl hub token list` shows their ids")
            await record(connection, actor, "token.revoke", target=token_id, detail={"name": row.name})
            await emit(connection, "token.revoked", None, {"id": token_id, "name": row.name})
        self._cache.clear()
        return _view(row)

    async def any_valid(self) -> bool:
        """Tell whether somebody could use this hub."""
        table = tables.token
        lives = or_(table.c.expires_at.is_(None), table.c.expires_at > time.time())
        async with self._database.read() as connection:
            query = select(table.c.id).where(table.c.revoked_at.is_(None), lives).limit(1)
            return (await connection.execute(query)).first() is not None

    async def any_exist(self) -> bool:
        async with self._database.read() as connection:
            return (await connection.execute(select(tables.token.c.id).limit(1))).first() is not None


def _hash(secret: str) -> str:
    # 256 random bits need no slow hash; the lookup by hash leaks nothing of the secret through time.
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _view(row: object) -> TokenView:
    values = row._mapping  # type: ignore[attr-defined]
    roles: list[TokenRole] = list(values["roles"].split(","))
    return TokenView(
        id=values["id"],
        name=values["name"],
        roles=roles,
        pattern=values["pattern"],
        last4=values["last4"],
        created_at=iso(values["created_at"]),
        expires_at=iso_or_none(values["expires_at"]),
        last_used_at=iso_or_none(values["last_used_at"]),
        revoked_at=iso_or_none(values["revoked_at"]),
    )
