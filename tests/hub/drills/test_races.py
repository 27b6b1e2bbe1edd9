"""Promises 2, 3 and 5: one of many wins, no reader sees a mixture, and gc beside everything loses nothing alive."""

import concurrent.futures
import itertools
import json
import random
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from drills import LONG
from hub_nursery import Hatched, Nursery, nursery
from push_books import Books, look, push

pytestmark = pytest.mark.drill

_OWN = "/api/loractl/v1/adapters/team/name"


def _http(hub: Hatched) -> httpx.Client:
    return httpx.Client(
        base_url=hub.url,
        headers={"authorization": f"Bearer {hub.admin}"},
        timeout=60.0,
        limits=httpx.Limits(max_connections=60),
    )


@pytest.fixture
def forks(tmp_path: Path) -> Any:
    with nursery(tmp_path / "log") as running:
        yield running


def _versions(http: httpx.Client, count: int) -> list[str]:
    http.post("/api/repos/create", json={"name": "name", "organization": "team"})
    books = Books()
    for number in range(count):
        push(http, books, "team/name", f"content {number} ")
    return [oid for _, oid in books.commits]


def test_of_fifty_promoters_one_wins_each_round_and_history_is_a_chain(forks: Nursery, tmp_path: Path) -> None:
    num_clients, num_rounds = 50, 40 if LONG else 2
    hub = forks.serve(tmp_path / "hub")
    with _http(hub) as http, concurrent.futures.ThreadPoolExecutor(num_clients) as pool:
        commits = _versions(http, 3)
        old: str | None = None
        codes: dict[int, int] = {}
        for number in range(num_rounds):
            barrier = threading.Barrier(num_clients)

            def promote(who: int, old: str | None, number: int, barrier: threading.Barrier) -> tuple[int, str]:
                to = commits[(who + number) % 3]
                barrier.wait()
                body = {"channel": "prod", "revision": to, "expected_old": old, "reason": f"{number}/{who}"}
                return http.post(f"{_OWN}/promote", json=body).status_code, to

            asked = [pool.submit(promote, who, old, number, barrier) for who in range(num_clients)]
            answers = [one.result() for one in asked]
            won = [to for code, to in answers if code == 200]
            # Moving a channel to where it is already leaves `expected_old` true for those who come later.
            assert won
            for code, _ in answers:
                codes[code] = codes.get(code, 0) + 1
            moves = http.get(f"{_OWN}/history", params={"channel": "prod", "limit": 1000}).json()["moves"]
            of_round = [move for move in moves if move["reason"].startswith(f"{number}/")]
            real = [move for move in of_round if move["old_commit"] != move["new_commit"]]
            assert len(of_round) == len(won)
            assert len(real) <= 1
            old = moves[0]["new_commit"]
        moves = http.get(f"{_OWN}/history", params={"channel": "prod", "limit": 1000}).json()["moves"][::-1]
    assert set(codes) == {200, 409}
    assert moves[0]["old_commit"] is None
    assert all(before["new_commit"] == after["old_commit"] for before, after in itertools.pairwise(moves))
    print(f"drill 26: clients={num_clients}, rounds={num_rounds}, codes={codes}, moves={len(moves)}")


def test_no_reader_sees_a_mixture_while_a_channel_moves(forks: Nursery, tmp_path: Path) -> None:
    num_moves, num_readers = 1000 if LONG else 40, 4
    hub = forks.serve(tmp_path / "hub")
    over = threading.Event()
    with _http(hub) as http, concurrent.futures.ThreadPoolExecutor(num_readers) as pool:
        commits = _versions(http, 4)
        expected = {oid: f"content {number} " for number, oid in enumerate(commits)}
        http.post(f"{_OWN}/promote", json={"channel": "prod", "revision": commits[0]}).raise_for_status()

        def read() -> tuple[int, int]:
            """As clients do: the channel names a commit, files are read by it, and each says of which it is."""
            num_read, seen = 0, set[str]()
            with _http(hub) as own:
                while not over.is_set():
                    info = own.get("/api/models/team/name/revision/prod").json()
                    text = expected[info["sha"]]
                    assert {one["rfilename"] for one in info["siblings"]} == {"a.txt", "b.txt", "large.txt"}
                    for path, times in (("a.txt", 1), ("b.txt", 1), ("large.txt", 200)):
                        answer = own.get(f"/team/name/resolve/{info['sha']}/{path}")
                        assert answer.text == text * times
                        assert answer.headers["x-repo-commit"] == info["sha"]
                    by_name = own.get("/team/name/resolve/prod/large.txt")
                    assert by_name.text == expected[by_name.headers["x-repo-commit"]] * 200
                    own_view = own.get("/api/loractl/v1/resolve", params={"repo": "team/name", "revision": "prod"})
                    assert own_view.json()["commit"] in expected
                    num_read += 1
                    seen.add(info["sha"])
            return num_read, len(seen)

        readers = [pool.submit(read) for _ in range(num_readers)]
        try:
            for number in range(num_moves):
                body = {"channel": "prod", "revision": commits[(number + 1) % 4]}
                http.post(f"{_OWN}/promote", json=body).raise_for_status()
        finally:
            over.set()
        reads = [one.result() for one in readers]
    assert min(num for num, _ in reads) > 0
    print(f"drill 26b: promotions={num_moves}, snapshots={sum(num for num, _ in reads)}, commits_seen={reads}")


def test_gc_without_grace_beside_pushes_and_deletions_loses_nothing_alive(forks: Nursery, tmp_path: Path) -> None:
    num_turns, num_clients = (150, 4) if LONG else (9, 3)
    root, books = tmp_path / "hub", Books()
    hub = forks.serve(root)
    over = threading.Event()
    refused: dict[str, int] = {}
    # The same few contents again and again: what one deletes, another is just about to name.
    texts = [f"content {number} " for number in range(4)]

    def work(number: int) -> None:
        chance = random.Random(number)
        with _http(hub) as http:
            for turn in range(num_turns):
                repo = f"team/r{number}-{turn // 3}"
                http.post("/api/repos/create", json={"name": repo.partition("/")[2], "organization": "team"})
                try:
                    push(http, books, repo, chance.choice(texts))
                except httpx.HTTPStatusError as error:
                    # Its upload was collected before it was named, which it is told; grace is zero here.
                    if error.response.status_code != 400 or "was not uploaded" not in error.response.text:
                        raise
                    with books.lock:
                        refused["collected"] = refused.get("collected", 0) + 1
                if turn % 3 == 2 and chance.random() < 0.7:
                    with books.lock:
                        books.deleted.add(repo)
                    body = {"name": repo.partition("/")[2], "organization": "team"}
                    http.request("DELETE", "/api/repos/delete", content=json.dumps(body)).raise_for_status()

    def collect() -> int:
        num_runs = 0
        while not over.is_set():
            assert forks.collect(root).end == 0
            num_runs += 1
        return num_runs

    with concurrent.futures.ThreadPoolExecutor(num_clients + 1) as pool:
        collector = pool.submit(collect)
        workers = [pool.submit(work, number) for number in range(num_clients)]
        try:
            for worker in workers:
                worker.result()
        finally:
            over.set()
        num_runs = collector.result()
    num_commits, named = look(root, books)
    assert forks.collect(root, upload_ttl_s=0.0).end == 0
    assert {path.name for path in (root / "blobs").rglob("*") if path.is_file()} == named
    print(
        f"drill gc: pushes={books.num_acknowledged}, refused={refused}, deleted={len(books.deleted)}, "
        f"gc_runs={num_runs}, commits={num_commits}, blobs={len(named)}"
    )
