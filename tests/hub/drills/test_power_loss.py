"""Promise 1 under a power cut: SIGKILL leaves the page cache, this does not.

A hub's writes are recorded in order; the drill cuts the record anywhere and keeps of what was not fsynced nothing, all,
or any part, torn at sectors. The hub that is found there is the one before or the one after, never one between.
"""

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from drills import LONG
from loractl.hub.database import SQLITE_FILE
from power_cut import Disk, Step, build_shim, read_record
from push_books import Books, look

pytestmark = pytest.mark.drill

NUM_CUTS, NUM_PUSHES = (1000, 40) if LONG else (45, 14)


def _record(folder: Path) -> list[Step]:
    root = folder / "recorded"
    root.mkdir()
    program = Path(__file__).parents[2] / "support" / "recorded_pushes.py"
    shim = {"LD_PRELOAD": str(build_shim(folder)), "DISK_ROOT": str(root), "DISK_RECORD": str(folder / "record")}
    subprocess.run([sys.executable, str(program), str(root), str(NUM_PUSHES)], check=True, env=os.environ | shim)
    return read_record(folder / "record")


def _books(acks: bytes) -> tuple[Books, int]:
    books, num_acks = Books(), 0
    for line in acks.splitlines():
        fact = json.loads(line)
        num_acks += 1
        if "deleted" in fact:
            books.deleted.add(fact["repo"])
        elif "oid" in fact:
            books.commits[fact["repo"], fact["oid"]] = fact["files"]
    return books, num_acks


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_power_cut_leaves_the_state_before_or_after(tmp_path: Path) -> None:
    steps = _record(tmp_path)
    syncs = sum(step.kind == "s" for step in steps)
    chance = random.Random(3)
    cuts = sorted(chance.randrange(len(steps) + 1) for _ in range(NUM_CUTS))
    disk, position, num_empty, num_checked = Disk(), 0, 0, 0
    for number, cut in enumerate(cuts):
        for step in steps[position:cut]:
            disk.play(step)
        position = cut
        root = tmp_path / f"cut-{number}"
        disk.materialise(root, chance, keep=(0.0, 0.5, 1.0)[number % 3])
        books, num_acks = _books(disk.acks)
        if (root / SQLITE_FILE).exists() and _has_schema(root):
            look(root, books)
            num_checked += 1
        else:
            assert num_acks == 0, f"step {cut} of {len(steps)}: {num_acks} acknowledgements and no database"
            num_empty += 1
        shutil.rmtree(root)
    print(f"drill 2: steps={len(steps)}, fsyncs={syncs}, cuts={NUM_CUTS}, before_the_first_start={num_empty}")
    assert num_checked > NUM_CUTS // 2


def _has_schema(root: Path) -> bool:
    connection = sqlite3.connect(root / SQLITE_FILE)
    try:
        return bool(connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'repo'").fetchone())
    finally:
        connection.close()
