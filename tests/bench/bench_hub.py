"""Times a hub beside `cp` and `sha256sum` of the same bytes: JSON lines, ratios of one run. Run it alone.

transfer   push and pull of one 100 MB adapter, by `loractl` and by the stock client, against cp + sha256sum
parts      where the stock client's push of the same adapter spends its time
repush     bytes that go over the wire when nothing has changed
lookup     `resolve` under a Zipf mix and pages of `list`, over a growing number of repos
"""

import argparse
import asyncio
import bisect
import itertools
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import save_file
from sqlalchemy import insert

from hub_process import HubProcess, hub_process
from live_postgres import live_postgres
from loractl.adapters.digest import file_sha256
from loractl.adapters.local_cache import AdapterCache
from loractl.adapters.manifest import BasePin, Manifest, save_manifest
from loractl.adapters.reference import AdapterRef
from loractl.hub import tables
from loractl.hub.client import HubClient
from loractl.hub.database import Database, database_url, open_database
from loractl.hub.migrate import migrate
from loractl.hub.wire import API_PREFIX

_RANK, _HIDDEN, _LAYERS = 64, 4096, 12
_ROUNDS = 5
_ALL = ("transfer", "parts", "repush", "lookup")
_BATCH = 2000


def show(**figures: Any) -> None:
    """One line of JSON."""
    print(
        json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}),
        flush=True,
    )


def make_adapter(folder: Path, *, seed: int) -> Path:
    """An adapter of 100 MB that passes every check: random weights, as real ones cannot be packed either."""
    folder.mkdir(parents=True)
    random_numbers = np.random.default_rng(seed)
    weights: dict[str, Any] = {}
    for layer, target in itertools.product(range(_LAYERS), ("q_proj", "k_proj", "v_proj", "o_proj")):
        name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
        weights[f"{name}.lora_A.weight"] = random_numbers.standard_normal((_RANK, _HIDDEN), dtype=np.float32)
        weights[f"{name}.lora_B.weight"] = random_numbers.standard_normal((_HIDDEN, _RANK), dtype=np.float32)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "bench-base", "r": _RANK,
        "lora_alpha": _RANK, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_manifest(Manifest(base=BasePin(id="bench-base", fingerprint="sha256:" + "0" * 64), rank=_RANK), folder)
    return folder


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def copy_and_hash(source: Path, target: Path) -> None:
    """What a push cannot do without: copy the bytes, have them on the disk, and know their hash."""
    subprocess.run(["cp", source, target], check=True)
    subprocess.run(["sync", target], check=True)
    subprocess.run(["sha256sum", target], check=True, stdout=subprocess.DEVNULL)


def bench_transfer(work: Path) -> None:
    """Push and pull, in turn with the yardstick, so that a slow spell of the machine meets all of them."""
    times: dict[str, list[float]] = {}
    size = 0
    with hub_process(work / "hub") as hub:
        for turn in range(_ROUNDS):
            folder = make_adapter(work / f"adapter{turn}", seed=turn)
            weights = folder / "adapter_model.safetensors"
            size = weights.stat().st_size
            calls: dict[str, Callable[[], None]] = {
                "cp + sha256sum": partial(copy_and_hash, weights, work / "copy"),
                "loractl push": partial(_push, hub, folder, f"bench/own{turn}"),
                "loractl pull": partial(_pull, hub, f"bench/own{turn}", work / f"cache{turn}"),
                "hf push (xet)": partial(_stock, hub, folder, f"bench/xet{turn}", xet=True, work=work),
                "hf push (lfs)": partial(_stock, hub, folder, f"bench/lfs{turn}", xet=False, work=work),
            }
            for name, call in calls.items():
                times.setdefault(name, []).append(seconds(call))
            for place in (folder, work / f"cache{turn}"):
                shutil.rmtree(place)
        yardstick = statistics.median(times["cp + sha256sum"])
        for name, found in times.items():
            took = statistics.median(found)
            show(
                bench="transfer",
                what=name,
                size_mb=size / 1e6,
                seconds=took,
                mb_per_s=size / 1e6 / took,
                ratio=yardstick / took,
            )


def _push(hub: HubProcess, folder: Path, repo: str) -> None:
    namespace, _, name = repo.partition("/")
    with HubClient(hub.url, hub.admin) as client:
        client.push(folder, AdapterRef(namespace, name))


def _pull(hub: HubProcess, repo: str, cache: Path) -> None:
    namespace, _, name = repo.partition("/")
    with HubClient(hub.url, hub.admin) as client:
        client.fetch(client.resolve(AdapterRef(namespace, name)), AdapterCache(cache))


def _stock(hub: HubProcess, folder: Path, repo: str, *, xet: bool, work: Path) -> None:
    """A push by the stock client in a process of its own, since it reads settings once; its start counts too."""
    script = (
        "import sys; from huggingface_hub import HfApi; api = HfApi();"
        "api.create_repo(sys.argv[2]); api.upload_folder(repo_id=sys.argv[2], folder_path=sys.argv[1])"
    )
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub.admin,
        "HF_HOME": str(work / "hf"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    if not xet:
        settings["HF_HUB_DISABLE_XET"] = "1"
    subprocess.run(
        [sys.executable, "-c", script, str(folder), repo],
        check=True,
        env=os.environ | settings,
        stderr=subprocess.DEVNULL,
    )


def bench_parts(work: Path) -> None:
    """The shares of one push by the stock client: its start, its own hashing, each request, and what is left."""
    folder = make_adapter(work / "parts", seed=7)
    weights = folder / "adapter_model.safetensors"
    for xet in (False, True):
        start = seconds(lambda: subprocess.run([sys.executable, "-c", "from huggingface_hub import HfApi"], check=True))
        hashing = seconds(lambda: file_sha256(weights))
        with hub_process(work / f"hub-parts-{xet}") as hub:
            begin = len(hub.text())
            took = seconds(partial(_stock, hub, folder, "bench/parts", xet=xet, work=work))
            requests = _requests_of(hub.text(begin))
        inside = sum(requests.values())
        show(bench="parts", what=f"hf push ({'xet' if xet else 'lfs'})", seconds=took, start=start / took,
             one_hashing=hashing / took, in_requests=inside / took, rest=1 - (start + hashing + inside) / took,
             **{name: spent / took for name, spent in requests.items() if spent / took >= 0.01})  # fmt: skip


def _requests_of(log: str) -> dict[str, float]:
    """Seconds by request, from the hub's own access log; sending and receiving overlap within."""
    found: dict[str, float] = {}
    for line in log.splitlines():
        entry = json.loads(line) if line.startswith("{") else {}
        if "seconds" in entry:
            name = f"{entry['method']} {re.sub('[0-9a-f]{32,}|main', '*', entry['path'])}"
            found[name] = found.get(name, 0.0) + entry["seconds"]
    return found


def bench_repush(work: Path) -> None:
    """What a second push of the same folder, and one of another card, send: weights would be 100 MB."""
    folder = make_adapter(work / "again", seed=99)
    with hub_process(work / "hub-repush") as hub:
        before = 0.0
        for what in ("first", "the same again", "another card"):
            if what == "another card":
                (folder / "README.md").write_text("# Another card\n")
            _push(hub, folder, "bench/again")
            sent = _uploaded(hub)
            show(bench="repush", what=what, weight_bytes=int(sent - before))
            before = sent


def _uploaded(hub: HubProcess) -> float:
    """Bytes of files that the hub has taken in, apart from the commit's own body."""
    page = httpx.get(f"{hub.url}/metrics").text
    return next(
        float(line.split()[1]) for line in page.splitlines() if line.startswith("loractl_hub_upload_bytes_total")
    )


async def seed_repos(database: Database, first: int, last: int) -> None:
    """Put repos [first, last) straight into the books, each with `main` and v1."""
    await migrate(database)
    for start in range(first, last, _BATCH):
        numbers = range(start, min(start + _BATCH, last))
        async with database.write() as connection:
            if start == 0:
                names = [{"name": f"team{number}", "created_at": 1.0} for number in range(100)]
                await connection.execute(insert(tables.namespace), names)
            for table, rows in _rows(numbers).items():
                await connection.execute(insert(tables.metadata.tables[table]), rows)
    if not database.is_sqlite:
        async with database.write() as connection:
            await connection.exec_driver_sql("ANALYZE")


def _rows(numbers: range) -> dict[str, list[dict[str, Any]]]:
    oids = {number: f"{number:040x}" for number in numbers}
    repos = [
        {
            "id": number + 1, "namespace": f"team{number % 100}", "name": f"adapter{number}",
            "folded": f"team{number % 100}/adapter{number}", "private": False, "created_at": float(number),
            "updated_at": float(number), "num_downloads": 0, "next_version": 2,
        }
        for number in numbers
    ]  # fmt: skip
    commits = [
        {
            "oid": oids[number], "repo": number + 1, "title": "push", "message": "", "author": "bench",
            "created_at": float(number), "tree_sha256": "0" * 64, "num_files": 2, "size_bytes": 1, "version": "v1",
            "digest": f"sha256:{number:064x}", "adapter_size_bytes": 1, "base_id": f"base{number % 20}",
            "base_fingerprint": f"sha256:{number % 20:064x}", "task": f"task{number % 50}", "rank": 8,
            "metrics": "{}", "tags": "[]",
        }
        for number in numbers
    ]  # fmt: skip
    refs = [
        {
            "repo": number + 1, "name": name, "kind": kind, "commit_oid": oids[number], "protected": False,
            "message": "", "updated_at": 1.0,
        }
        for number in numbers
        for name, kind in (("main", "branch"), ("v1", "version"))
    ]  # fmt: skip
    return {"repo": repos, "commit_log": commits, "ref": refs}


def bench_lookup(work: Path, *, kind: str, url: str | None, sizes: list[int], num_requests: int) -> None:
    """Ask a hub of growing size what names mean, and for pages of its list, one request after the other."""
    root = work / f"lookup-{kind}"
    root.mkdir()
    environment = {"LORACTL_HUB_DATABASE_URL": url} if url else {}
    seeded = 0
    admin = ""
    for size in sizes:
        asyncio.run(_seed(database_url(root, url), seeded, size))
        seeded = size
        hub = HubProcess(root, environment)
        hub.start()
        admin = admin or hub.admin
        try:
            with httpx.Client(base_url=hub.url + API_PREFIX, headers={"Authorization": f"Bearer {admin}"}) as http:
                for what, asked in _questions(size, num_requests).items():
                    times = sorted(_ask(http, path, params) for path, params in asked)
                    show(
                        bench="lookup", database=kind, repos=size, what=what, requests=len(times),
                        p50_ms=1e3 * times[len(times) // 2], p99_ms=1e3 * times[int(len(times) * 0.99)],
                    )  # fmt: skip
        finally:
            hub.stop()


async def _seed(url: str, first: int, last: int) -> None:
    database = open_database(url)
    try:
        await seed_repos(database, first, last)
    finally:
        await database.close()


def _questions(size: int, num_requests: int) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """`resolve` by popularity 1/rank over shuffled repos; first pages of lists, whole and narrowed."""
    chooser = random.Random(0)
    order = list(range(size))
    chooser.shuffle(order)
    weights = list(itertools.accumulate(1.0 / rank for rank in range(1, size + 1)))
    drawn = [order[bisect.bisect(weights, chooser.random() * weights[-1])] for _ in range(num_requests)]
    few = max(num_requests // 20, 20)
    return {
        "resolve": [("/resolve", {"repo": f"team{one % 100}/adapter{one}"}) for one in drawn],
        "list": [("/adapters", {"limit": 50})] * few,
        "list --base": [("/adapters", {"limit": 50, "base": f"base{number % 20}"}) for number in range(few)],
        "list --task": [("/adapters", {"limit": 50, "task": f"task{number % 50}"}) for number in range(few)],
        "list --text": [("/adapters", {"limit": 50, "text": f"adapter{size - 1 - number}"}) for number in range(few)],
    }


def _ask(http: httpx.Client, path: str, params: dict[str, Any]) -> float:
    started = time.perf_counter()
    http.get(path, params=params, timeout=60.0).raise_for_status()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", choices=[*_ALL], default=[*_ALL])
    parser.add_argument("--repos", type=int, nargs="+", default=[100, 10_000, 100_000])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--database", nargs="+", choices=["sqlite", "postgres"], default=["sqlite", "postgres"])
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loractl-bench-") as folder:
        work = Path(folder)
        if "transfer" in chosen.only:
            bench_transfer(work)
        if "parts" in chosen.only:
            bench_parts(work)
        if "repush" in chosen.only:
            bench_repush(work)
        if "lookup" in chosen.only and "sqlite" in chosen.database:
            bench_lookup(work, kind="sqlite", url=None, sizes=chosen.repos, num_requests=chosen.requests)
        if "lookup" in chosen.only and "postgres" in chosen.database:
            with live_postgres() as postgres:
                url = postgres.create_database("bench")
                bench_lookup(work, kind="postgres", url=url, sizes=chosen.repos, num_requests=chosen.requests)


if __name__ == "__main__":
    main()
