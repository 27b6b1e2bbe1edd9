"""Promise 1: what was acknowledged survives kill -9 at any moment, and nothing is half there.

Clients push, promote and delete without pause while the hub's process is killed: at each named failpoint, at the n-th
time it is reached, and at random moments. After each death a hub is started on the same folder, every acknowledged
push is read back byte for byte, and what lies in the folder is looked at without the hub's help.
"""

import concurrent.futures
import hashlib
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from drills import LONG
from hub_nursery import Hatched, Nursery, nursery
from push_books import Books, look, push

pytestmark = pytest.mark.drill

# The short form, in CI, dies at each named point once and twice at random; `make drills` makes it 500 kills, in five
# folders, since each look at what was promised takes the longer the more that is.
NUM_KILLS = 100 if LONG else 14
NUM_HUBS = 5 if LONG else 1
NUM_CLIENTS = 4
_HUB = Path(__file__).parents[3] / "hub"
SERVE_POINTS = (
    "blob-before-fsync", "blob-before-publish", "blob-before-rename", "blob-after-rename", "blob-before-row",
    "commit-before-ref", "commit-before-end", "commit-after-end", "promote-before-end", "repo-before-end",
)  # fmt: skip
GC_POINTS = ("gc-after-mark", "gc-after-unlink")


def _promote(http: httpx.Client, books: Books, repo: str) -> None:
    place = f"/api/loractl/v1/adapters/{repo}/promote"
    http.post(place, json={"channel": "prod", "revision": "main"}).raise_for_status()
    with books.lock:
        books.num_acknowledged += 1


def _delete(http: httpx.Client, books: Books, repo: str) -> None:
    name = repo.partition("/")[2]
    http.request("DELETE", "/api/repos/delete", json={"name": name, "organization": "team"}).raise_for_status()
    with books.lock:
        books.deleted.add(repo)
        books.num_acknowledged += 1


def _client(url: str, admin: str, books: Books, number: int, seed: int) -> None:
    """Work in repos of its own until the hub is gone."""
    chance = random.Random(seed)
    headers = {"authorization": f"Bearer {admin}"}
    with httpx.Client(base_url=url, headers=headers, timeout=30.0) as http:
        for turn in range(10_000):
            repo = f"team/r{number}-{seed}-{turn // 2}"
            try:
                if turn % 2 == 0:
                    http.post("/api/repos/create", json={"name": repo.partition("/")[2], "organization": "team"})
                push(http, books, repo, f"{number}-{seed}-{turn}-{chance.random()} ")
                _promote(http, books, repo)
                if turn % 2 == 1 and chance.random() < 0.5:
                    _delete(http, books, repo)
            except httpx.HTTPStatusError as error:
                # Its upload was collected before it was named, which it is told; gc has no grace here.
                if error.response.status_code != 400 or "was not uploaded" not in error.response.text:
                    raise
            except httpx.TransportError:
                with books.lock:
                    books.num_unknown += 1
                    # It may or may not have been deleted; nothing is promised of it from here on.
                    books.deleted.add(repo)
                    for key in [key for key in books.commits if key[0] == repo and turn % 2 == 1]:
                        del books.commits[key]
                return


def _work_until_dead(hub: Hatched, books: Books, seed: int) -> "list[concurrent.futures.Future[None]]":
    pool = concurrent.futures.ThreadPoolExecutor(NUM_CLIENTS)
    futures = [
        pool.submit(_client, hub.url, hub.admin, books, number, seed * NUM_CLIENTS + number)
        for number in range(NUM_CLIENTS)
    ]
    pool.shutdown(wait=False)
    return futures


def _read_back(hub: Hatched, books: Books, chance: random.Random) -> None:
    """A sample of what was promised, by the way a client takes."""
    kept = [key for key in books.commits if key[0] not in books.deleted]
    headers = {"authorization": f"Bearer {hub.admin}"}
    with httpx.Client(base_url=hub.url, headers=headers, timeout=30.0) as http:
        for repo, oid in chance.sample(kept, min(len(kept), 3)):
            for path, sha256 in books.commits[repo, oid].items():
                answer = http.get(f"/{repo}/resolve/{oid}/{path}")
                assert (answer.status_code, hashlib.sha256(answer.content).hexdigest()) == (200, sha256)


def _places(chance: random.Random) -> list[str]:
    """The kills of this run: every named point, the n-th time it is reached; the others, half of many, at random."""
    points = [*SERVE_POINTS, *GC_POINTS]
    half = max(len(points), NUM_KILLS // 2)
    places = [f"{points[number % len(points)]}:{chance.randrange(1, 5)}" for number in range(half)]
    places += ["random"] * (NUM_KILLS - half)
    chance.shuffle(places)
    return places


def test_drill_knows_every_failpoint_of_the_hub() -> None:
    text = "".join(path.read_text() for path in _HUB.rglob("*.py"))
    assert set(re.findall(r'\breach\("([a-z-]+)"\)', text)) == {*SERVE_POINTS, *GC_POINTS}


@pytest.mark.parametrize("number", range(NUM_HUBS))
def test_acknowledged_pushes_survive_kills(tmp_path: Path, number: int) -> None:
    root, books, chance = tmp_path / "hub", Books(), random.Random(7 + number)
    num_died: dict[str, int] = {}
    started = time.monotonic()
    with nursery(tmp_path / "log") as forks:
        for seed, place in enumerate(_places(random.Random(11 + number))):
            point = place.partition(":")[0]
            _one_kill(forks, root, books, chance, seed=seed, place=place, point=point)
            num_died[point] = num_died.get(point, 0) + 1
        num_commits, named = look(root, books)
        # What no commit names is gone after one gc, and nothing else is.
        num_before = _num_blobs(root)
        assert forks.collect(root, upload_ttl_s=0.0).end == 0
        num_after = _num_blobs(root)
        _, still = look(root, books)
        assert still == named
        assert {path.name for path in (root / "blobs").rglob("*") if path.is_file()} == named
        assert list((root / "staging").iterdir()) == []
    print(
        f"drill 1: kills={NUM_KILLS}, acknowledged={books.num_acknowledged}, answers_lost={books.num_unknown}, "
        f"commits={num_commits}, blobs_before_gc={num_before}, after={num_after}, "
        f"seconds={time.monotonic() - started:.0f}, {num_died}"
    )
    assert books.num_acknowledged > NUM_KILLS


def _one_kill(
    forks: Nursery, root: Path, books: Books, chance: random.Random, *, seed: int, place: str, point: str
) -> None:
    is_gc = point in GC_POINTS
    hub = forks.serve(root, failpoint=None if is_gc or place == "random" else place, upload_ttl_s=3600.0)
    if forks.is_running(hub):
        _read_back(hub, books, chance)
        clients = _work_until_dead(hub, books, seed)
        if is_gc:
            _collect_until_dead(forks, root, place)
            forks.kill(hub)
        elif place == "random":
            # At an instant that nobody chose, some acknowledgements later.
            wanted = books.num_acknowledged + chance.randrange(4)
            _until(lambda: books.num_acknowledged >= wanted)
            time.sleep(chance.random() * 0.05)
            forks.kill(hub)
        else:
            _until(lambda: not forks.is_running(hub))
        for client in clients:
            client.result(60.0)
    assert hub.end == -9, forks.log.read_text(errors="replace")[-2000:]
    look(root, books)


def _collect_until_dead(forks: Nursery, root: Path, place: str) -> None:
    """gc beside the clients, whose deleted repos give it work."""
    deadline = time.monotonic() + 60.0
    while (end := forks.collect(root, failpoint=place, upload_ttl_s=3600.0).end) != -9:
        assert end == 0, f"gc ended with {end}: {forks.log.read_text(errors='replace')[-2000:]}"
        assert time.monotonic() < deadline, f"gc never came to {place}"
        # One run may find too little to come there that often.
        place = place.partition(":")[0]


def _num_blobs(root: Path) -> int:
    return sum(path.is_file() for path in (root / "blobs").rglob("*"))


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline, "nothing happens any more"
        time.sleep(0.005)
