"""PostgreSQL restarts and S3 fails under load: 503 and never 500, nothing acknowledged lost, nothing half visible.

Clients push, promote and read without pause on a hub whose database is stopped and killed, and whose S3 store answers
500, never answers, or cuts its answers. They ask again after a 503, as stock clients do.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from drills import LONG, print_figures
from faulty_proxy import FaultyProxy, faulty_proxy
from hub_nursery import Hatched, nursery
from live_postgres import LivePostgres
from live_s3 import LiveS3
from loractl.hub.run import check_store
from loractl.hub.settings import HubSettings
from push_books import Books, push

pytestmark = pytest.mark.drill

NUM_ROUNDS, NUM_CLIENTS, S3_TIMEOUT_S = (8, 8, 3.0) if LONG else (1, 3, 0.4)
FAULTS = ("s3 500", "s3 hang", "s3 cut", "postgres stop", "postgres kill", "postgres backend")
_FILES = ("a.txt", "b.txt", "large.txt")


@dataclass
class _Load:
    """What all clients met."""

    hub: Hatched
    books: Books = field(default_factory=Books)
    codes: collections.Counter[int] = field(default_factory=collections.Counter[int])
    wrong: list[str] = field(default_factory=list[str])
    slowest_s: float = 0.0
    over: threading.Event = field(default_factory=threading.Event)

    def http(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.hub.admin}"}
        hooks: dict[str, list[Callable[..., Any]]] = {"response": [self._note]}
        return httpx.Client(base_url=self.hub.url, headers=headers, timeout=60.0, event_hooks=hooks)

    def _note(self, answer: httpx.Response) -> None:
        answer.read()
        status = answer.status_code
        is_good = status < 500 or (status == 503 and "retry-after" in answer.headers)
        with self.books.lock:
            self.codes[status] += 1
            self.slowest_s = max(self.slowest_s, answer.elapsed.total_seconds())
            if not is_good:
                self.wrong.append(f"{answer.request.method} {answer.request.url.path}: {status} {answer.text[:300]}")

    def num_refused(self) -> int:
        return self.codes[503]


def _patiently(load: _Load, ask: Callable[[], None]) -> None:
    """Ask until it is not refused for the time being; whatever else comes is the drill's failure."""
    while True:
        try:
            ask()
        except httpx.HTTPStatusError as error:
            if error.response.status_code != 503:
                raise
            time.sleep(0.05)
        else:
            return


def _client(load: _Load, number: int) -> None:
    chance = random.Random(number)
    repo = f"team/r{number}"
    create = {"name": f"r{number}", "organization": "team"}
    with load.http() as http:
        _patiently(load, lambda: _checked(http.post("/api/repos/create", json=create), 409))
        for turn in range(1_000_000):
            # Now and then in parts: more than one of S3's.
            text = f"{number}-{turn} " * (8000 if turn % 20 == 7 else 1)
            _patiently(load, functools.partial(push, http, load.books, repo, text))
            _patiently(load, lambda: _checked(http.post(_promote_path(repo), json=_TO_PROD)))
            with load.books.lock:
                key, files = chance.choice([one for one in load.books.commits.items() if one[0][0] == repo])
            _patiently(load, functools.partial(_read, http, key, files, chance.choice(_FILES)))
            if load.over.is_set():
                return


_TO_PROD = {"channel": "prod", "revision": "main"}


def _promote_path(repo: str) -> str:
    return f"/api/loractl/v1/adapters/{repo}/promote"


def _checked(answer: httpx.Response, *good: int) -> None:
    if answer.status_code not in good:
        answer.raise_for_status()


def _read(http: httpx.Client, key: tuple[str, str], files: dict[str, str], path: str) -> None:
    answer = http.get(f"/{key[0]}/resolve/{key[1]}/{path}")
    answer.raise_for_status()
    assert hashlib.sha256(answer.content).hexdigest() == files[path]


@contextlib.contextmanager
def _fault(name: str, proxy: FaultyProxy, postgres: LivePostgres) -> Iterator[None]:
    kind, _, how = name.partition(" ")
    if kind == "s3":
        proxy.outage = how
        try:
            yield
        finally:
            proxy.outage = None
        return
    if how == "backend":
        assert postgres.kill_backend()
        yield
        return
    postgres.kill() if how == "kill" else postgres.stop()
    try:
        yield
    finally:
        postgres.start()


def _until(condition: Callable[[], bool], load: _Load) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < 60.0, f"nothing happens any more; {load.codes} {load.wrong[:3]}"
        time.sleep(0.02)
    return time.monotonic() - started


def _ready(http: httpx.Client) -> dict[str, bool]:
    facts: dict[str, bool] = http.get("/readyz").json()
    return facts


def _one_fault(name: str, load: _Load, proxy: FaultyProxy, postgres: LivePostgres) -> float:
    """Break, see it refused and told, mend; the seconds until a push is acknowledged again."""
    part, other = ("blobs", "database") if name.startswith("s3") else ("database", "blobs")
    refused = load.num_refused()
    with httpx.Client(base_url=load.hub.url, timeout=60.0) as http, _fault(name, proxy, postgres):
        # A server that mends itself may be back before anybody asked.
        if not name.endswith("backend"):
            _until(lambda: load.num_refused() >= refused + NUM_CLIENTS, load)
            _until(lambda: _ready(http) == {"ready": False, part: False, other: True}, load)
        assert http.get("/healthz").status_code == 200
        assert http.get("/metrics").status_code == 200
    acknowledged = load.books.num_acknowledged
    took_s = _until(lambda: load.books.num_acknowledged >= acknowledged + 2 * NUM_CLIENTS, load)
    with httpx.Client(base_url=load.hub.url, timeout=60.0) as http:
        _until(lambda: _ready(http)["ready"], load)
    return took_s


def _check_all(load: _Load) -> int:
    """Every acknowledged commit is there, every commit that is there is whole and of one push."""
    num_commits = 0
    with load.http() as http:
        for number in range(NUM_CLIENTS):
            repo = f"team/r{number}"
            place, oids = f"/api/models/{repo}/commits/main?limit=1000", list[str]()
            while place:
                answer = http.get(place)
                oids += [one["id"] for one in answer.json()]
                place = answer.links.get("next", {}).get("url", "")
            promised = {oid: files for (of, oid), files in load.books.commits.items() if of == repo}
            assert set(promised) <= set(oids)
            prod = http.get(f"/api/models/{repo}/revision/prod").json()["sha"]
            assert prod in oids
            for oid in oids[:-1]:
                texts = {path: http.get(f"/{repo}/resolve/{oid}/{path}").content for path in _FILES}
                assert texts["a.txt"] == texts["b.txt"]
                assert texts["large.txt"] == texts["a.txt"] * 200
                for path, sha256 in promised.get(oid, {}).items():
                    assert hashlib.sha256(texts[path]).hexdigest() == sha256
                num_commits += 1
    return num_commits


def test_outages_of_database_and_blobs_are_503_and_lose_nothing(
    tmp_path: Path, postgres: LivePostgres, s3: LiveS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"outage-{secrets.token_hex(6)}"
    places: dict[str, Any] = {"database_url": postgres.create_database(name), "blobs": s3.url(name)}
    recovered: dict[str, list[float]] = {fault: [] for fault in FAULTS}
    with faulty_proxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with nursery(tmp_path / "log") as forks, concurrent.futures.ThreadPoolExecutor(NUM_CLIENTS) as pool:
            load = _Load(forks.serve(tmp_path / "hub", s3_timeout_s=S3_TIMEOUT_S, **places))
            clients = [pool.submit(_client, load, number) for number in range(NUM_CLIENTS)]
            try:
                _until(lambda: load.books.num_acknowledged >= NUM_CLIENTS, load)
                for fault in FAULTS * NUM_ROUNDS:
                    recovered[fault].append(_one_fault(fault, load, proxy, postgres))
            finally:
                load.over.set()
            for client in clients:
                client.result(60.0)
            num_commits = _check_all(load)
            assert load.wrong == []
            assert "Traceback" not in forks.log.read_text()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    report = asyncio.run(check_store(HubSettings(root=tmp_path / "hub", **places), read_data=True))
    assert report.is_sound, report
    print_figures(
        "postgres and s3",
        faults=len(FAULTS) * NUM_ROUNDS,
        acknowledged=load.books.num_acknowledged,
        commits=num_commits,
        codes=dict(sorted(load.codes.items())),
        slowest_s=round(load.slowest_s, 1),
        s3_timeout_s=S3_TIMEOUT_S,
        back_after_s={fault: round(max(took), 2) for fault, took in recovered.items()},
    )
