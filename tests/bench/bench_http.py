"""What the HTTP side costs: the same burst through `loractl serve` and through the engine alone. Run it alone.

Both are the installed commands in processes of their own, taken in turns, so that the machine's moods reach both; the
server is up all the time and idle while the engine alone is measured. Client, server and engine share the cores.
JSON lines: each round, then the ratio of the medians and the event loop's processor time a token.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from demo_assets import demo_base
from demo_processes import LORACTL, Service, free_port, start_service
from tiny_models import make_adapter

_TICKS = os.sysconf("SC_CLK_TCK")


def show(**figures: Any) -> None:
    """One line of JSON."""
    print(json.dumps(figures), flush=True)


@contextlib.contextmanager
def server(base: Path, adapters: Sequence[Path], *, slots: int, streams: int, folder: Path) -> Iterator[Service]:
    """A server with these adapters by their folders' names, its log in `folder`."""
    port = free_port()
    named = [word for adapter in adapters for word in ("--adapter", f"{adapter.name}={adapter}")]
    sizes = ["--slots", str(max(1, slots)), "--max-rank", "64", "--max-running", str(min(64, streams))]
    words = ("serve", str(base), "--port", str(port), *named, *sizes)
    service = start_service("server", *words, url=f"http://127.0.0.1:{port}", folder=folder, environment={})
    try:
        service.wait_until_ready()
        yield service
    finally:
        service.stop()


def offline(base: Path, root: Path, options: argparse.Namespace) -> float:
    words = ["bench", "engine", "--base", str(base), "--requests", str(options.streams), "--runs", "3"]
    words += ["--distinct", str(options.distinct), "--adapters", str(root)]
    words += ["--prompt-tokens", str(options.prompt_tokens), "--output-tokens", str(options.output_tokens)]
    return float(_run(words)["output_tokens_per_s"])


def online(url: str, models: Sequence[str], options: argparse.Namespace, *, seed: int) -> dict[str, Any]:
    words = ["bench", "serve", "--server", url, "--requests", str(options.streams), "--in-turn"]
    words += ["--concurrency", str(options.streams), "--seed", str(seed)]
    words += ["--prompt-tokens", str(options.prompt_tokens), "--output-tokens", str(options.output_tokens)]
    return _run([*words, *(word for model in models for word in ("--model", model))])


def _run(words: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run([LORACTL, *words], check=True, capture_output=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    if figures.get("failures"):
        raise RuntimeError(str(figures["failures"]))
    return figures


def _loop_seconds(pid: int) -> float:
    """Processor time of the server's first thread, which is the event loop's."""
    fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def measure(base: Path, root: Path, options: argparse.Namespace) -> None:
    folders = [path.parent for path in sorted(root.glob("*/adapter_config.json"))][: options.distinct]
    alone, served, spent = list[float](), list[float](), list[float]()
    with (
        tempfile.TemporaryDirectory() as work,
        server(base, folders, slots=len(folders), streams=options.streams, folder=Path(work)) as service,
    ):
        url, pid = service.url, service.process.pid
        models = [folder.name for folder in folders] or [base.name]
        online(url, models, options, seed=1000)
        for round_number in range(options.rounds):
            alone.append(offline(base, root, options))
            for run in range(3):
                before = _loop_seconds(pid)
                seen = online(url, models, options, seed=10 * round_number + run)
                served.append(seen["output_tokens_per_s"])
                spent.append((_loop_seconds(pid) - before) / seen["output_tokens"])
            show(round=round_number, engine=alone[-1], http=served[-3:])
    show(
        streams=options.streams,
        adapters=len(folders),
        engine_tokens_per_s=statistics.median(alone),
        http_tokens_per_s=statistics.median(served),
        ratio=round(statistics.median(served) / statistics.median(alone), 3),
        event_loop_us_per_token=round(1e6 * statistics.median(spent)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The same burst over HTTP and through the engine alone.")
    parser.add_argument("--base", type=Path, help="a base's folder; SmolLM2-135M if not given")
    parser.add_argument("--adapters", type=Path, help="a folder of adapters; random ones of rank 8 if not given")
    parser.add_argument("--distinct", type=int, default=0, help="adapters in use; 0: the bare base")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    options = parser.parse_args()
    base = options.base or demo_base()
    with tempfile.TemporaryDirectory() as made:
        root = options.adapters or Path(made)
        if options.adapters is None:
            for number in range(options.distinct):
                make_adapter(base, root / f"a{number:02}", seed=number, std=0.02, r=8)
        measure(base, root, options)


if __name__ == "__main__":
    main()
