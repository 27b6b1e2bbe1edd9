"""The disk tier: adapters by digest, shared by every process of this user or server.

    ROOT/sha256/<hex>/           one complete adapter, never changed once it is there
    ROOT/staging/<random>/       being filled; made whole by one rename, swept when its process is gone
    ROOT/used/<hex>              modification time = last use
    ROOT/pins/<hex>.<random>     locked while a process uses the adapter
    ROOT/locks/<hex>             locked while a process fills it, so that one download serves all

Content is verified before it becomes visible and again when it is taken. Refuses to know where adapters come from.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loractl.adapters.digest import folder_digest
from loractl.adapters.errors import AdapterInvalid, UsageError, WillNotFit
from loractl.adapters.reference import Digest, is_digest

_STALE_STAGING_S = 6 * 3600.0
Stage = Literal["fill", "verify"]


@dataclass(frozen=True, slots=True)
class CachedAdapter:
    """One adapter in the cache."""

    digest: Digest
    size_bytes: int
    last_used_at: float
    """Seconds since the epoch."""


class AdapterCache:
    """A folder of adapters with a size limit; safe for many threads and processes on one file system."""

    def __init__(
        self,
        root: Path,
        *,
        max_bytes: int | None = None,
        on_stage: Callable[[Stage, float], None] = lambda stage, seconds: None,
    ) -> None:
        """Keep adapters below `root`; `on_stage` hears how many seconds each filling and each check of hashes took."""
        self.root = root
        self.max_bytes = max_bytes
        self.num_evictions = 0
        """Adapters that made room for others, by this process."""
        self._on_stage = on_stage
        for name in ("sha256", "staging", "used", "pins", "locks"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def get(self, digest: Digest) -> Path | None:
        """The adapter's folder, verified by hash; None when it is absent. Broken content is removed."""
        folder = self._folder(digest)
        if not os.path.lexists(folder):
            return None
        with self._timed("verify"):
            is_sound = _is_sound(folder, digest)
        if not is_sound:
            self._remove(folder)
            return None
        self._touch(digest)
        return folder

    def put(self, digest: Digest, fill: Callable[[Path], None]) -> Path:
        """Return the adapter's folder, filled by `fill(empty folder)` if it is absent.

        Raises AdapterInvalid when what came does not hash to `digest` (nothing is kept), WillNotFit when it is larger
        than the cache.
        """
        if (present := self.get(digest)) is not None:
            return present
        with _lock(self.root / "locks" / _hex(digest)):
            return self.get(digest) or self._install(digest, fill)

    def _install(self, digest: Digest, fill: Callable[[Path], None]) -> Path:
        staging = self.root / "staging" / secrets.token_hex(8)
        staging.mkdir()
        try:
            with self._timed("fill"):
                fill(staging)
            with self._timed("verify"):
                self._verify(staging, digest)
            self.make_room(_size_bytes(staging), keep=digest)
            self._publish(staging, digest)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        self._touch(digest)
        return self._folder(digest)

    @contextlib.contextmanager
    def _timed(self, stage: Stage) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._on_stage(stage, time.monotonic() - started)

    @contextlib.contextmanager
    def pin(self, digest: Digest) -> Iterator[None]:
        """Keep an adapter from eviction, by any process, while the context is open."""
        self._folder(digest)
        path = self.root / "pins" / f"{_hex(digest)}.{secrets.token_hex(8)}"
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o600)
        try:
            # The lock tells a living pin from one whose process was killed.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)

    def list(self) -> list[CachedAdapter]:
        """What is here, least recently used first."""
        found: list[CachedAdapter] = []
        for folder in (self.root / "sha256").iterdir():
            digest = Digest(f"sha256:{folder.name}")
            if is_digest(digest):
                found.append(CachedAdapter(digest, _size_bytes(folder), self._last_used(digest)))
        return sorted(found, key=lambda cached: cached.last_used_at)

    def evict(self, digest: Digest) -> bool:
        """Remove one adapter; False when it is pinned."""
        with _lock(self.root / "locks" / "evict"):
            if self._is_pinned(digest):
                return False
            self._remove(self._folder(digest))
            (self.root / "used" / _hex(digest)).unlink(missing_ok=True)
            return True

    def make_room(self, num_bytes: int, *, keep: Digest | None = None) -> None:
        """Evict the least recently used until `num_bytes` more fit; raises WillNotFit when pins leave no room."""
        self._sweep_staging()
        if self.max_bytes is None:
            return
        if num_bytes > self.max_bytes:
            raise WillNotFit(f"an adapter of {num_bytes:,} bytes is larger than the cache of {self.max_bytes:,}")
        present = [cached for cached in self.list() if cached.digest != keep]
        total = sum(cached.size_bytes for cached in present)
        for cached in present:
            if total + num_bytes <= self.max_bytes:
                return
            if self.evict(cached.digest):
                total -= cached.size_bytes
                self.num_evictions += 1
        if total + num_bytes > self.max_bytes:
            raise WillNotFit(
                f"{self.root}: {total:,} of {self.max_bytes:,} bytes are in use, {num_bytes:,} more do not fit",
                hint="give the cache more room, or serve fewer adapters at once",
            )

    def _verify(self, staging: Path, digest: Digest) -> None:
        if (found := folder_digest(staging)) != digest:
            raise AdapterInvalid(
                f"what came is {found[:19]}..., not {digest[:19]}...: nothing was installed",
                hint="the hub or the connection changed the files; try again, then run `loractl hub fsck`",
            )

    def _publish(self, staging: Path, digest: Digest) -> None:
        for path in staging.rglob("*"):
            if path.is_file():
                _fsync(path)
                path.chmod(0o444)
        try:
            staging.rename(self._folder(digest))
        except OSError:
            # Another process was first; what it installed is the same content, or is broken and found by get().
            if self.get(digest) is None:
                staging.rename(self._folder(digest))
        _fsync(self.root / "sha256")

    def _folder(self, digest: Digest) -> Path:
        return self.root / "sha256" / _hex(digest)

    def _touch(self, digest: Digest) -> None:
        with contextlib.suppress(OSError):
            (self.root / "used" / _hex(digest)).touch()

    def _last_used(self, digest: Digest) -> float:
        try:
            return (self.root / "used" / _hex(digest)).stat().st_mtime
        except OSError:
            return 0.0

    def _is_pinned(self, digest: Digest) -> bool:
        return any(_is_held(path) for path in (self.root / "pins").glob(f"{_hex(digest)}.*"))

    def _remove(self, folder: Path) -> None:
        """Out of sight by one rename, then deleted: no reader sees half an adapter."""
        if folder.is_symlink() or folder.is_file():
            folder.unlink(missing_ok=True)
            return
        doomed = self.root / "staging" / secrets.token_hex(8)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _sweep_staging(self) -> None:
        cutoff = time.time() - _STALE_STAGING_S
        for folder in (self.root / "staging").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if folder.stat().st_mtime < cutoff:
                    shutil.rmtree(folder, ignore_errors=True)


def _hex(digest: Digest) -> str:
    if not is_digest(digest):
        raise UsageError(f"not a digest: {digest[:80]!r}")
    return digest.removeprefix("sha256:")


def _is_sound(folder: Path, digest: Digest) -> bool:
    """Plain files only, and the right hash: a link could be swapped after the check."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            return False
    try:
        return folder_digest(folder) == digest
    except (AdapterInvalid, OSError):
        return False


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a file's lock; the system drops it when the process ends, however it ends."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_held(pin: Path) -> bool:
    try:
        descriptor = os.open(pin, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        pin.unlink(missing_ok=True)
        return False
    finally:
        os.close(descriptor)


def _size_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
