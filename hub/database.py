"""Transactions on SQLite or PostgreSQL, many readers and orderly writers. Knows no table's meaning.

SQLite runs in WAL with `synchronous=FULL`: a transaction that returned is on the disk. Its writers take the one lock
at once (`BEGIN IMMEDIATE`) and queue in this process, so that a push never fails because another was busy.
"""

import asyncio
import contextlib
import sqlite3
import weakref
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from loractl.adapters.errors import LoractlError, Unreachable, UsageError
from loractl.hub.blobs.store import disk_full
from loractl.hub.metrics import HubMetrics

SQLITE_FILE = "hub.sqlite3"
_BUSY_TIMEOUT_S = 30.0
_NUM_READERS = 8
# Classes of PostgreSQL's SQLSTATE codes, https://www.postgresql.org/docs/current/errcodes-appendix.html
_DISK_FULL = "53100"
_BUSY_CLASSES = ("53", "55P03")
_SERIALIZATION_CLASSES = ("40",)
_PASSING_CLASSES = ("08", "25006", "53", "55P03", "57", "58", *_SERIALIZATION_CLASSES)


class Database:
    """A pool of connections; `read` and `write` are the only ways in."""

    def __init__(
        self,
        engine: AsyncEngine,
        writer: AsyncEngine,
        metrics: HubMetrics,
        *,
        driver_errors: tuple[type[Exception], ...] = (),
    ) -> None:
        self.engine = engine
        # While it connects, the driver's own errors pass through SQLAlchemy as they are.
        self._away: tuple[type[BaseException], ...] = (
            *(InterfaceError, PoolTimeoutError, ConnectionError, TimeoutError),
            *driver_errors,
        )
        self._writer = writer
        self._metrics = metrics
        self._write_lock = asyncio.Lock()

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """Open a snapshot for reading. Raises Unreachable when the database is away."""
        with self._metrics.db_seconds.labels(op="read").time(), self._as_unreachable():
            async with self.engine.connect() as connection:
                yield connection

    @contextlib.asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """Open one transaction: durable when the block ends, undone when it raises. Raises Unreachable."""
        with self._metrics.db_seconds.labels(op="write").time(), self._as_unreachable():
            if not self.is_sqlite:
                async with self._writer.begin() as connection:
                    yield connection
                return
            async with self._write_lock, self._writer.begin() as connection:
                yield connection

    async def is_alive(self) -> bool:
        """Ask the database for a trivial answer."""
        try:
            async with asyncio.timeout(5.0), self.read() as connection:
                await connection.execute(text("SELECT 1"))
        except (Unreachable, TimeoutError):
            return False
        return True

    def connections(self) -> dict[str, int]:
        """How many connections of the pool are in use and how many wait for work."""
        pool = self.engine.pool
        if not isinstance(pool, AsyncAdaptedQueuePool):
            return {}
        return {"busy": pool.checkedout(), "idle": pool.checkedin()}

    async def close(self) -> None:
        await self.engine.dispose()
        if self._writer is not self.engine:
            await self._writer.dispose()

    @contextlib.contextmanager
    def _as_unreachable(self) -> Iterator[None]:
        try:
            with _translated(self._away):
                yield
        except LoractlError as error:
            cause = error.__cause__
            if cause is not None and isinstance(cause, (DBAPIError, *self._away)):
                self._metrics.db_errors.labels(kind=_kind(cause)).inc()
            raise


def _kind(cause: BaseException) -> str:
    """What went wrong, in one of a few words."""
    code = str(getattr(getattr(cause, "orig", None), "sqlstate", None) or "")
    text = str(cause)
    if isinstance(cause, PoolTimeoutError) or "locked" in text or code.startswith(_BUSY_CLASSES):
        return "busy"
    if code.startswith(_SERIALIZATION_CLASSES):
        return "serialization"
    return "disk_full" if "disk is full" in text or code == _DISK_FULL else "connection"


@contextlib.contextmanager
def _translated(away: tuple[type[BaseException], ...]) -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        if "disk is full" in str(error.orig):
            raise disk_full() from error
        raise Unreachable("the hub's database does not answer", retry_after_s=2.0) from error
    except away as error:
        raise Unreachable("the hub's database does not answer", retry_after_s=2.0) from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise Unreachable("the hub lost its database", retry_after_s=2.0) from error
        code = str(getattr(error.orig, "sqlstate", None) or "")
        if code == _DISK_FULL:
            raise disk_full() from error
        if code.startswith(_PASSING_CLASSES):
            raise Unreachable("the hub's database is busy or restarts", retry_after_s=2.0) from error
        raise


def database_url(root: Path, url: str | None) -> str:
    """Name the database for SQLAlchemy's async drivers; raises UsageError for another kind of database."""
    if url is None:
        return f"sqlite+aiosqlite:///{root / SQLITE_FILE}"
    for prefix in ("postgresql+asyncpg://", "postgresql://", "postgres://"):
        if url.startswith(prefix):
            return "postgresql+asyncpg://" + url.removeprefix(prefix)
    if url.startswith("sqlite:///"):
        return "sqlite+aiosqlite:///" + url.removeprefix("sqlite:///")
    raise UsageError(
        f"--database-url {make_url(url).render_as_string() if '://' in url else url!r} is not known",
        hint="postgresql://user:password@host/name, or nothing for SQLite",
    )


def open_database(url: str, *, metrics: HubMetrics | None = None) -> Database:
    """Make the engines for a URL from `database_url`; connects lazily."""
    metrics = metrics or HubMetrics()
    if url.startswith("sqlite"):
        options: dict[str, Any] = {
            "poolclass": AsyncAdaptedQueuePool,
            "max_overflow": 0,
            "connect_args": {"factory": _LettingGo},
        }
        readers = create_async_engine(url, pool_size=_NUM_READERS, pool_timeout=_BUSY_TIMEOUT_S, **options)
        writer = create_async_engine(url, pool_size=1, **options)
        event.listen(readers.sync_engine, "connect", _prepare_sqlite)
        event.listen(writer.sync_engine, "connect", _prepare_sqlite)
        event.listen(readers.sync_engine, "begin", _begin_snapshot)
        event.listen(writer.sync_engine, "begin", _begin_immediate)
        return Database(readers, writer, metrics)
    from asyncpg import PostgresError

    engine = create_async_engine(
        url,
        pool_size=_NUM_READERS,
        max_overflow=_NUM_READERS,
        pool_pre_ping=True,
        pool_timeout=10.0,
        connect_args={"timeout": 10, "command_timeout": 60},
    )
    return Database(engine, engine, metrics, driver_errors=(PostgresError,))


class _LettingGo(sqlite3.Connection):
    """Ends its transaction and its cursors when it is closed.

    A cancelled task's traceback keeps its cursor, and SQLite keeps the locks of a closed connection for as long as one
    of its cursors lives: until the garbage collector came by, nobody else could write.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._cursors: weakref.WeakSet[sqlite3.Cursor] = weakref.WeakSet()

    def cursor(self, *args: Any, **more: Any) -> Any:
        made = super().cursor(*args, **more)
        self._cursors.add(made)
        return made

    def close(self) -> None:
        for cursor in list(self._cursors):
            cursor.close()
        if self.in_transaction:
            self.rollback()
        super().close()


def _prepare_sqlite(connection: Any, record: object) -> None:
    del record
    # Python would otherwise begin transactions by itself, and too late for BEGIN IMMEDIATE.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={int(_BUSY_TIMEOUT_S * 1000)}",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_snapshot(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN")


def _begin_immediate(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
