"""Compares the memory that `loractl plan` promises with what the run then reached, for every preset that fits.

`PYTHONPATH=tests/support:tests/demo python tests/bench/bench_plan.py` plans and does three steps of each preset over
SmolLM2-135M, each in a process of its own. JSON lines on stdout; a busy machine changes no bytes.
"""

import argparse
import csv
import json
import random
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from demo_assets import demo_base
from demo_data import write_demo_data
from loractl.adapters.training.recipe import Recipe, preset_names, resolve_recipe
from tool_rows import tool_row, tool_speaking_base

NUM_STEPS, NUM_ROWS = 3, 120
_MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="*", default=preset_names(), help="[all]")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        _part(**json.loads(options.part))
        return
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        for preset in options.presets:
            _compare(preset, folder)


def _compare(preset: str, folder: Path) -> None:
    wanted = {"preset": preset, "base": str(demo_base()), "data": str(_rows_for(preset, folder)), "folder": str(folder)}
    if preset == "agent":
        base = folder / "base"
        wanted["base"] = str(base if base.is_dir() else tool_speaking_base(base))
    plan, reached = (_run_part(wanted | {"kind": kind}) for kind in ("plan", "run"))
    parts = {name: round(size / _MIB) for name, size in plan.items()}
    planned, peak = sum(parts.values()), round(reached["peak"] / _MIB)
    off = {"off_percent": round(100 * (planned / peak - 1), 1)}
    print(json.dumps({"preset": preset, "planned_mib": planned, "reached_mib": peak} | off | parts), flush=True)


def _rows_for(preset: str, folder: Path) -> Path:
    """Films for most, pairs of labels for DPO, tool calls for agents."""
    data = write_demo_data(folder, num_movies=NUM_ROWS, num_products=8, num_verdicts=8, num_held_out=8)
    rows: list[dict[str, Any]]
    if preset == "agent":
        draw = random.Random(0)
        rows = [tool_row(draw, half=0) for _ in range(NUM_ROWS)]
    elif preset == "dpo":
        other = {"positive": "negative", "negative": "positive"}
        with data.movies.open(newline="") as file:
            rows = [
                {"prompt": row["text"], "chosen": row["label"], "rejected": other[row["label"]]}
                for row in csv.DictReader(file)
            ]
    else:
        return data.movies
    path = folder / f"{preset}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _run_part(wanted: dict[str, str]) -> dict[str, int]:
    command = [sys.executable, __file__, "--part", json.dumps(wanted)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    facts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return facts


# What follows runs in a process of its own, which prints one line.


def _part(*, kind: str, preset: str, base: str, data: str, folder: str) -> None:
    recipe = _recipe(preset, base, data, out=f"{folder}/{preset}-{kind}")
    if kind == "plan":
        from loractl.adapters.training.planning import make_plan

        print(json.dumps(asdict(make_plan(recipe).memory)))
        return
    from loractl.adapters.training.run import run

    run(recipe, listener=lambda _: None)
    print(json.dumps({"peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))


def _recipe(preset: str, base: str, data: str, *, out: str) -> Recipe:
    given: dict[str, Any] = {"base": base, "data.files": [data], "out": out, "data.eval_share": 0.1}
    if preset in {"quick", "classify", "regret", "qlora"}:
        given["data.template"] = "Review: {text} Label: {label}"
    train = resolve_recipe(preset=preset, file=None, settings=given).train
    given["train.epochs"] = NUM_STEPS * train.batch_size * train.accumulation / (0.9 * NUM_ROWS)
    return resolve_recipe(preset=preset, file=None, settings=given)


if __name__ == "__main__":
    main()
