"""What is in the cache is what was asked for, whoever writes and whatever breaks."""

import threading
from pathlib import Path

import pytest

from hostile_files import CONFIG, WEIGHTS, sound_files, weights
from loractl.adapters.digest import folder_digest
from loractl.adapters.errors import AdapterInvalid, WillNotFit
from loractl.adapters.local_cache import AdapterCache
from loractl.adapters.reference import Digest


def _write(folder: Path, seed: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    for name, data in sound_files().items():
        (folder / name).write_bytes(data)
    (folder / CONFIG).write_bytes(sound_files()[CONFIG] + b" " * seed)


def _digest(tmp_path: Path, seed: int = 0) -> Digest:
    folder = tmp_path / f"source{seed}"
    _write(folder, seed)
    return folder_digest(folder)


@pytest.mark.parametrize("damage", ["flip", "truncate", "link", "folder link"])
def test_broken_content_is_found_and_fetched_once_more(tmp_path: Path, damage: str) -> None:
    cache, digest, fills = AdapterCache(tmp_path / "cache"), _digest(tmp_path), []

    def fill(folder: Path) -> None:
        fills.append(folder)
        _write(folder)

    path = cache.put(digest, fill) / WEIGHTS
    path.parent.chmod(0o755)
    path.chmod(0o644)
    data = weights()
    if damage == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    elif damage == "link":
        path.unlink()
        path.symlink_to(tmp_path / "source0" / WEIGHTS)
    else:
        path.parent.rename(tmp_path / "moved")
        (cache.root / "sha256" / digest[7:]).symlink_to(tmp_path / "moved")
    assert cache.get(digest) is None
    assert folder_digest(cache.put(digest, fill)) == digest
    assert len(fills) == 2


def test_wrong_content_is_never_installed(tmp_path: Path) -> None:
    cache, digest = AdapterCache(tmp_path / "cache"), _digest(tmp_path)
    with pytest.raises(AdapterInvalid):
        cache.put(digest, lambda folder: _write(folder, seed=1))
    assert cache.get(digest) is None
    assert list((cache.root / "staging").iterdir()) == []


def test_many_threads_share_one_download(tmp_path: Path) -> None:
    digest, fills = _digest(tmp_path), []

    def fill(folder: Path) -> None:
        fills.append(folder)
        _write(folder)

    threads = [threading.Thread(target=lambda: AdapterCache(tmp_path / "cache").put(digest, fill)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(fills) == 1


def test_least_recently_used_goes_first_and_pinned_stays(tmp_path: Path) -> None:
    digests = [_digest(tmp_path, seed) for seed in range(3)]
    size = sum(path.stat().st_size for path in (tmp_path / "source0").iterdir())
    cache = AdapterCache(tmp_path / "cache", max_bytes=2 * size + 10)
    cache.put(digests[0], lambda folder: _write(folder, 0))
    cache.put(digests[1], lambda folder: _write(folder, 1))
    with cache.pin(digests[0]):
        cache.put(digests[2], lambda folder: _write(folder, 2))
    assert {cached.digest for cached in cache.list()} == {digests[0], digests[2]}
    with cache.pin(digests[0]), cache.pin(digests[2]), pytest.raises(WillNotFit):
        cache.put(digests[1], lambda folder: _write(folder, 1))


def test_pin_of_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    cache, digest = AdapterCache(tmp_path / "cache"), _digest(tmp_path)
    cache.put(digest, _write)
    (cache.root / "pins" / f"{digest[7:]}.dead").touch()
    assert cache.evict(digest)
    assert cache.get(digest) is None
