"""`loractl bench`: measure the engine by itself, in this process, or a server. No torch until a measurement begins."""

import json
from pathlib import Path
from typing import Any

import click

from loractl.adapters.errors import NotFound, UsageError
from loractl.cli.bench_serve_command import serve


@click.group(short_help="Measure the engine or any OpenAI-compatible server.")
def bench() -> None:
    """Measure the engine or any OpenAI-compatible server."""


bench.add_command(serve)


@bench.command(short_help="Measure the engine without HTTP.")
@click.option(
    "--base", "base_folder", required=True, type=click.Path(path_type=Path), help="Base in transformers' format."
)
@click.option("--adapters", type=click.Path(path_type=Path), help="Folder whose subfolders are adapters.")
@click.option("--requests", "num_requests", type=click.IntRange(1), default=16, show_default=True)
@click.option(
    "--distinct", type=click.IntRange(0), default=16, show_default=True, help="Adapters in use; 0: bare base."
)
@click.option("--prompt-tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens of each prompt.")
@click.option("--output-tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens of each answer.")
@click.option("--quantize", type=click.Choice(["int8", "nf4", "none"]), default="int8", show_default=True)
@click.option("--max-rank", type=click.IntRange(1), default=64, show_default=True, help="Highest rank a slot holds.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Bursts; the median counts.")
@click.option("--ratios", "all_ratios", is_flag=True, help="Measure every ratio; half the adapters fill the slots.")
@click.option("--peer", "peers", multiple=True, metavar="NAME=COMMAND", help="Another engine to run beside (--ratios).")
def engine(base_folder: Path, adapters: Path | None, **options: Any) -> None:
    """Answer a burst of requests of random tokens and print one line of JSON; with --ratios, one a figure.

    Adapters are loaded and the first steps are taken before the clock starts; every answer has all its tokens.

    \b
    Example:
      loractl bench engine --base ./smollm2 --adapters ./adapters --requests 64 --distinct 32
    """
    from loractl.server.engine.base_model import load_base
    from loractl.server.engine.measure import Work, make_engine, medians, ratios, uses_of

    folders = _adapter_folders(adapters, options["distinct"])
    work = Work(
        num_requests=options["num_requests"],
        num_prompt_tokens=options["prompt_tokens"],
        num_output_tokens=options["output_tokens"],
    )
    max_rank, num_runs = options["max_rank"], options["runs"]
    if options["all_ratios"]:
        if len(folders) < 2:
            raise UsageError("--ratios needs two adapters or more", hint="give --adapters and --distinct")
        peers = dict(_named_command(peer) for peer in options["peers"])
        for figure in ratios(base_folder, folders, max_rank=max_rank, work=work, num_runs=num_runs, peers=peers):
            click.echo(json.dumps(figure))
        return
    prepared = make_engine(
        load_base(base_folder, quantization=options["quantize"]),
        num_slots=max(1, len(folders)),
        max_rank=max_rank,
        num_requests=work.num_requests,
    )
    rate = medians({"burst": (prepared, uses_of(folders), work)}, num_runs=num_runs)["burst"]
    prepared.close()
    line = {
        "engine": f"loractl {options['quantize']}",
        "requests": work.num_requests,
        "adapters": len(folders),
        "prompt_tokens": work.num_prompt_tokens,
        "output_tokens": work.num_output_tokens,
        "output_tokens_per_s": rate,
    }
    click.echo(json.dumps(line))


def _named_command(text: str) -> tuple[str, str]:
    name, _, command = text.partition("=")
    if not command:
        raise UsageError(f"--peer {text}: no command", hint="--peer 'vllm=COMMAND'; it prints JSON lines as this does")
    return name, command


def _adapter_folders(root: Path | None, count: int) -> list[Path]:
    if not count:
        return []
    if root is None:
        raise UsageError("--adapters is missing", hint="give a folder of adapters, or --distinct 0 for the bare base")
    found = sorted(path.parent for path in root.glob("*/adapter_config.json"))
    if len(found) < count:
        raise NotFound(f"{root}: {len(found)} adapters, --distinct asks for {count}")
    return found[:count]
