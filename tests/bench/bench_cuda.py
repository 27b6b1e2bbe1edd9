"""Everything that is promised of a card, in one call of under ten minutes: is it right, and how fast.

    make bench-cuda                                              # where loractl is installed
    PYTHONPATH=build/ns:tests/support python tests/bench/bench_cuda.py   # where only its needs are (`make ns` once)

It needs a CUDA build of torch (2.11 or newer, with its Triton), transformers 5.17 or newer, peft, accelerate,
bitsandbytes, msgspec and lz4. Bases have a 7B model's shape and random weights, made on the card in int8. Results go to
`--out` as JSON, with the card's name and all versions, and as a table to stdout. `--dry-run` runs every section on the
CPU in a tiny shape, so that a person with a card finds no typo; its figures mean nothing.
"""

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from card_bench import EXPECTED, Bench
from card_checks import run_checks
from card_figures import int8_engine, packed_shape, registered, tiles
from card_models import BAICHUAN_7B, LLAMA_7B, TINY, TINY_PACKED
from card_peers import against_peft, dense, training

_PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate")

SECTIONS: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
    "int8": int8_engine,
    "packed": packed_shape,
    "dense": dense,
    "peft": against_peft,
    "registered": registered,
    "training": training,
    "tiles": tiles,
}


def machine(device: torch.device) -> dict[str, Any]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    facts: dict[str, Any] = {"python": sys.version.split()[0], **versions}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"card": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        if shutil.which("nvidia-smi"):
            done = subprocess.run(query, capture_output=True, text=True, check=False)
            facts["driver"] = done.stdout.strip()
    return facts


def sizes_of(arguments: argparse.Namespace, folder: Path) -> Bench:
    is_card = arguments.device == "cuda"
    ends_at = time.monotonic() + 60 * arguments.minutes
    common: dict[str, Any] = {"device": torch.device(arguments.device), "folder": folder, "ends_at": ends_at}
    if arguments.tiny:
        return Bench(
            **common, llama=TINY, packed=TINY_PACKED, num_requests=3, num_adapters=2, num_registered=6, rank=4,
            prompt_tokens=6, short_prompt_tokens=4, output_tokens=4, num_runs=1, train_tokens=8, kv_bytes=1 << 21,
            dtype=torch.bfloat16 if is_card else torch.float32,
        )  # fmt: skip
    return Bench(
        **common, llama=LLAMA_7B, packed=BAICHUAN_7B, num_requests=64, num_adapters=32, num_registered=1000, rank=16,
        prompt_tokens=512, short_prompt_tokens=128, output_tokens=128, num_runs=3, train_tokens=512,
        kv_bytes=64 * 704 * LLAMA_7B.num_layers * LLAMA_7B.hidden_size * 2 * 2, dtype=torch.bfloat16,
    )  # fmt: skip


def run(bench: Bench, arguments: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {
        "machine": machine(bench.device),
        "checks": [],
        "figures": [],
        "tiles": [],
        "skipped": [],
    }
    real = (arguments.base, arguments.adapter) if arguments.base and arguments.adapter else None
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "checks": lambda: run_checks(bench.folder, device=bench.device, num_requests=arguments.requests, real=real)
    }
    parts |= {name: partial(section, bench) for name, section in SECTIONS.items()}
    for name, part in parts.items():
        if arguments.only and name not in arguments.only:
            continue
        if time.monotonic() > bench.ends_at:
            results["skipped"].append({"section": name, "why": "no time was left"})
            continue
        start = time.monotonic()
        try:
            for row in part():
                kind = "checks" if "check" in row else "tiles" if "tile" in row else "figures"
                results[kind].append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
        except EXPECTED as error:
            if arguments.strict:
                raise
            results["skipped"].append({"section": name, "why": f"{type(error).__name__}: {error}"[:500]})
        bench.free()
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1))
    return results


def table(results: dict[str, Any]) -> Iterator[str]:
    facts = results["machine"]
    yield ", ".join(f"{name} {value}" for name, value in facts.items())
    yield "\n| check | holds | |\n|---|---|---|"
    for row in results["checks"]:
        rest = ", ".join(f"{key} {value}" for key, value in row.items() if key not in {"check", "ok"})
        yield f"| {row['check']} | {'yes' if row['ok'] else '**no**'} | {rest} |"
    yield "\n| figure | ours / other | ratio | aim |\n|---|---|---|---|"
    for row in results["figures"]:
        ours, other = (f"{value:,.4g}" if value is not None else "-" for value in (row["ours"], row["other"]))
        ratio = row["ratio"] if row["met"] is not False else f"**{row['ratio']}**"
        name = f"{row['figure']} ({row['note']})" if row["note"] else row["figure"]
        yield f"| {name} | {ours} / {other} | {ratio} | {row['aim']} |"
    if results["tiles"]:
        yield "\n| int8 product | us | speed |\n|---|---|---|"
        yield from (f"| {row['tile']} | {row['us']:.1f} | {row['speed']} |" for row in results["tiles"])
    yield from (f"not measured: {row['section']}: {row['why']}" for row in results["skipped"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes that a CPU runs in seconds; figures mean nothing")
    parser.add_argument("--dry-run", action="store_true", help="--device cpu --tiny, and every error ends the run")
    parser.add_argument("--minutes", type=float, default=9.0, help="sections that would start later are skipped")
    parser.add_argument("--requests", type=int, default=None, help="of the check with few slots; 10,000 on a card")
    parser.add_argument("--only", nargs="*", choices=["checks", *SECTIONS], help="sections to run")
    parser.add_argument("--base", type=Path, help="a small real base to compare with PEFT, with --adapter")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--out", type=Path, help="where the results go as JSON, after every section")
    arguments = parser.parse_args()
    arguments.strict = arguments.dry_run
    if arguments.dry_run:
        arguments.device, arguments.tiny = "cpu", True
    if arguments.requests is None:
        arguments.requests = 40 if arguments.tiny else 10_000
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --dry-run tries the script on the CPU", file=sys.stderr)
        return 4
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        results = run(sizes_of(arguments, Path(folder)), arguments)
    print("\n".join(table(results)))
    return 0 if all(row["ok"] for row in results["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
