"""Takes a copy of a whole hub while it is used, and makes a hub of a copy. Knows no request.

    backup/
      hub.sqlite3            the database at one moment, whatever kind the hub runs on
      blobs/sha256/ab/cd/... every blob that it names, hashed on the way
      backup.json            written last: without it there is no backup here

The database comes first and the blobs after it. A blob is never changed, so what is pushed meanwhile is only missing
from both; and when gc took one that the snapshot still names, a new snapshot no longer names it.
"""

import asyncio
import contextlib
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from sqlalchemy import delete, select

from loractl.adapters.errors import BadData, BlobMissing, Conflict, UsageError
from loractl.hub import tables
from loractl.hub.blobs.local import LocalBlobStore
from loractl.hub.blobs.store import BlobStore
from loractl.hub.database import SQLITE_FILE, Database, database_url, open_database
from loractl.hub.fsck import Report, check
from loractl.hub.migrate import migrate
from loractl.hub.moments import iso
from loractl.hub.registry.ledger import READY
from loractl.hub.services import open_hub, open_store
from loractl.hub.settings import HubSettings
from loractl.hub.table_copy import copy_tables

_MARK = "backup.json"
_FORMAT = 1
_MAX_SNAPSHOTS = 5


class BackupMark(msgspec.Struct, kw_only=True):
    """What `backup.json` says."""

    format: int = _FORMAT
    created_at: str
    num_blobs: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BackedUp:
    """What a backup holds, and how much of it was new to the folder."""

    num_blobs: int
    num_bytes: int
    num_copied: int


async def back_up(settings: HubSettings, folder: Path) -> BackedUp:
    """Copy a hub into a folder; a folder with an older backup of it takes only what is new.

    Raises UsageError for a hub or folder that is not there or holds something else, BadData for a damaged blob,
    Conflict when gc outran every snapshot.
    """
    _check_is_hub(settings)
    _make_folder(folder)
    kept = LocalBlobStore(folder)
    async with open_hub(settings) as hub:
        num_copied = 0
        for _ in range(_MAX_SNAPSHOTS):
            snapshot = folder / f".{SQLITE_FILE}-{secrets.token_hex(6)}"
            try:
                await _snapshot(hub.database, snapshot)
                blobs = await _blobs_of(snapshot)
                copied, missing = await _copy_blobs(hub.store, kept, blobs)
                num_copied += copied
                if missing:
                    await _check_collected(hub.database, missing)
                    continue
                _put_in_place(snapshot, folder / SQLITE_FILE)
            finally:
                _remove_sqlite(snapshot)
            async for found in kept.list_blobs():
                if found.sha256 not in blobs:
                    await kept.delete(found.sha256)
            mark = BackupMark(created_at=iso(time.time()), num_blobs=len(blobs), num_bytes=sum(blobs.values()))
            _write_mark(folder, mark)
            return BackedUp(num_blobs=mark.num_blobs, num_bytes=mark.num_bytes, num_copied=num_copied)
    raise Conflict("gc took blobs away faster than they were copied", hint="back up when no gc runs")


async def restore(settings: HubSettings, folder: Path) -> Report:
    """Make a hub of a backup, on SQLite or PostgreSQL, in a folder or on S3, and look whether all is there.

    Raises UsageError when there is no backup or the place holds a hub already, BadData for a damaged backup.
    """
    _check_mark(folder)
    await _check_is_empty(settings)
    store = await open_store(settings)
    blobs = await _blobs_of(folder / SQLITE_FILE)
    _, missing = await _copy_blobs(LocalBlobStore(folder), store, blobs)
    if missing:
        raise BadData(f"{folder} lacks {len(missing)} blobs: {', '.join(missing[:3])}", hint="use another backup")
    # The database last: a restore that stops before is no hub yet.
    await _restore_database(settings, folder / SQLITE_FILE)
    async with open_hub(settings) as hub:
        async with hub.database.write() as connection:
            # Their parts were not copied; clients begin again.
            await connection.execute(delete(tables.upload_session))
        return await check(hub, read_data=False)


def _make_folder(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / _MARK).is_file():
        raise UsageError(f"{folder} is not empty and holds no backup", hint="name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    # The database holds the hashes of tokens and the hub's signing key.
    folder.chmod(0o700)


def _write_mark(folder: Path, mark: BackupMark) -> None:
    (folder / _MARK).write_bytes(msgspec.json.format(msgspec.json.encode(mark)) + b"\n")


def _check_mark(folder: Path) -> None:
    try:
        mark = msgspec.json.decode((folder / _MARK).read_bytes(), type=BackupMark)
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"{folder} holds no backup: {_MARK} is missing or broken") from error
    if mark.format != _FORMAT:
        raise UsageError(f"{folder} has format {mark.format}, which this loractl does not read", hint="update loractl")


def _sqlite_path(settings: HubSettings) -> Path | None:
    url = database_url(settings.root, settings.database_url)
    return Path(url.removeprefix("sqlite+aiosqlite:///")) if url.startswith("sqlite") else None


def _check_is_hub(settings: HubSettings) -> None:
    path = _sqlite_path(settings)
    if path is not None and not path.is_file():
        raise UsageError(f"there is no hub in {settings.root}", hint="name its folder by --root")


async def _check_is_empty(settings: HubSettings) -> None:
    path = _sqlite_path(settings)
    if path is not None:
        if path.exists():
            raise UsageError(f"{path.parent} holds a hub already", hint="restore into another --root")
        return
    async with _database(database_url(settings.root, settings.database_url)) as database:
        await migrate(database)
        async with database.read() as connection:
            for table in tables.metadata.sorted_tables:
                if (await connection.execute(select(table).limit(1))).first() is not None:
                    raise UsageError("the database holds a hub already", hint="restore into an empty one")


@contextlib.asynccontextmanager
async def _database(url: str) -> AsyncIterator[Database]:
    database = open_database(url)
    try:
        yield database
    finally:
        await database.close()


async def _snapshot(database: Database, path: Path) -> None:
    """The database at one moment, as a SQLite file."""
    if database.is_sqlite:
        await asyncio.to_thread(_copy_sqlite, Path(str(database.engine.url.database)), path)
        return
    async with _database(f"sqlite+aiosqlite:///{path}") as target:
        await migrate(target)
        await copy_tables(database, target)
    # One file, without the log beside it.
    await asyncio.to_thread(_close_log, path)


async def _restore_database(settings: HubSettings, saved: Path) -> None:
    path = _sqlite_path(settings)
    _make_root(settings)
    if path is not None:
        staged = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
        await asyncio.to_thread(_copy_sqlite, saved, staged)
        _put_in_place(staged, path)
        return
    # A copy is brought to this version's schema, never the backup itself.
    work = settings.root / f".{SQLITE_FILE}-{secrets.token_hex(6)}"
    await asyncio.to_thread(_copy_sqlite, saved, work)
    try:
        url = database_url(settings.root, settings.database_url)
        async with _database(f"sqlite+aiosqlite:///{work}") as source, _database(url) as target:
            await migrate(source)
            await copy_tables(source, target)
    finally:
        _remove_sqlite(work)


def _make_root(settings: HubSettings) -> None:
    settings.root.mkdir(parents=True, exist_ok=True)


def _copy_sqlite(source: Path, target: Path) -> None:
    """SQLite's own online copy: a reader like any other, so pushes go on."""
    with (
        contextlib.closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True, timeout=30.0)) as reading,
        contextlib.closing(sqlite3.connect(target)) as writing,
    ):
        reading.backup(writing)
    _close_log(target)


def _close_log(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    path.chmod(0o600)


def _remove_sqlite(path: Path) -> None:
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm", f"{path.name}-journal"):
        path.with_name(name).unlink(missing_ok=True)


def _put_in_place(staged: Path, path: Path) -> None:
    descriptor = os.open(staged, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    shutil.move(staged, path)


async def _blobs_of(snapshot: Path) -> dict[str, int]:
    """The blobs that a saved database names, with their sizes."""

    def read() -> dict[str, int]:
        with contextlib.closing(sqlite3.connect(f"file:{snapshot}?mode=ro", uri=True)) as connection:
            return dict(connection.execute("SELECT sha256, size_bytes FROM blob WHERE state = ?", (READY,)))

    try:
        return await asyncio.to_thread(read)
    except sqlite3.DatabaseError as error:
        raise BadData(f"{snapshot} is damaged: {error}", hint="use another backup") from error


async def _copy_blobs(source: BlobStore, target: BlobStore, blobs: dict[str, int]) -> tuple[int, list[str]]:
    """Copy what the target does not have, hashed on the way: how many, and which the source lacks. Raises BadData."""
    num_copied = 0
    missing: list[str] = []
    for sha256, size_bytes in sorted(blobs.items()):
        if await target.size(sha256) == size_bytes:
            continue
        try:
            async with target.receive(source.read(sha256), sha256=sha256, size_bytes=size_bytes) as received:
                await target.publish(received)
        except BlobMissing:
            missing.append(sha256)
        else:
            num_copied += 1
    return num_copied, missing


async def _check_collected(database: Database, missing: list[str]) -> None:
    """Raise BadData unless gc took these blobs, in which case a new snapshot does not name them."""
    table = tables.blob
    async with database.read() as connection:
        ready = set((await connection.execute(select(table.c.sha256).where(table.c.state == READY))).scalars())
    if lost := sorted(ready.intersection(missing)):
        raise BadData(f"the hub lacks {len(lost)} blobs: {', '.join(lost[:3])}", hint="run `loractl hub fsck`")
