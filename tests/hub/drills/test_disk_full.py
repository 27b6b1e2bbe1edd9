"""Promise 6: a full disk refuses pushes by name, reads go on, and with space again everything does."""

import contextlib
import hashlib
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from drills import LONG
from hub_nursery import nursery
from push_books import Books, look, push

pytestmark = pytest.mark.drill

NUM_ROUNDS, DISK_MIB = (20, 8) if LONG else (1, 8)
_MOUNT = f'mount -t tmpfs -o size={DISK_MIB}m tmpfs "$0" && exec "$@"'


def _can_mount(folder: Path) -> bool:
    tried = subprocess.run(
        ["unshare", "-rm", "sh", "-c", _MOUNT, str(folder), "true"], capture_output=True, check=False
    )
    return tried.returncode == 0


def _fill(path: Path) -> None:
    """Take the last byte."""
    for size in (1 << 20, 1 << 12, 1):
        with contextlib.suppress(OSError), path.open("ab", buffering=0) as stream:
            while True:
                stream.write(b"x" * size)


@pytest.mark.parametrize("reserve", [0, 1 << 20], ids=["to the last byte", "with a reserve"])
def test_full_disk_refuses_pushes_and_nothing_else(tmp_path: Path, reserve: int) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if not _can_mount(disk):
        pytest.skip("this machine lets nobody mount in a namespace of their own")
    books, refusals = Books(), 0
    with nursery(tmp_path / "log", inside=["unshare", "-rm", "sh", "-c", _MOUNT, str(disk)]) as forks:
        hub = forks.serve(disk / "hub", free_bytes_reserve=reserve)
        filler = forks.files(disk) / "filler"
        with httpx.Client(base_url=hub.url, headers={"authorization": f"Bearer {hub.admin}"}, timeout=60.0) as http:
            http.post("/api/repos/create", json={"name": "name", "organization": "team"}).raise_for_status()
            for number in range(NUM_ROUNDS):
                push(http, books, "team/name", f"content {number} ")
                _fill(filler)
                for attempt in range(5):
                    with pytest.raises(httpx.HTTPStatusError) as raised:
                        push(http, books, "team/name", f"too much {number} {attempt} " * 300)
                    answer = raised.value.response
                    assert answer.status_code == 413, answer.text
                    assert "full" in answer.text or "in reserve" in answer.text
                    refusals += 1
                for (repo, oid), files in books.commits.items():
                    for path, sha256 in files.items():
                        read = http.get(f"/{repo}/resolve/{oid}/{path}")
                        assert (read.status_code, hashlib.sha256(read.content).hexdigest()) == (200, sha256)
                filler.unlink()
            push(http, books, "team/name", "after all ")
        # SQLite would follow the way in to our own root.
        shutil.copytree(forks.files(disk) / "hub", tmp_path / "copy")
        look(tmp_path / "copy", books)
        assert "Traceback" not in forks.log.read_text()
    print(f"drill 3: rounds={NUM_ROUNDS}, reserve={reserve}, refused={refusals}, kept={len(books.commits)}")
