"""`loractl bench`: measure the engine by itself, in this process. No torch until a measurement begins."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loractl.adapters.errors import NotFound, UsageError

if TYPE_CHECKING:
    from loractl.server.engine.engine import Engine
    from loractl.server.engine.messages import AdapterUse


@click.group(short_help="Measure the engine or any OpenAI-compatible server.")
def bench() -> None:
    """Measure the engine or any OpenAI-compatible server."""


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
def engine(base_folder: Path, adapters: Path | None, **options: Any) -> None:
    """Answer a burst of requests of random tokens and print one line of JSON.

    Adapters are loaded and the first steps are taken before the clock starts; every answer has all its tokens.

    \b
    Example:
      loractl bench engine --base ./smollm2 --adapters ./adapters --requests 64 --distinct 32
    """
    folders = _adapter_folders(adapters, options["distinct"])
    prepared = _prepare(base_folder, folders, options)
    uses = _uses(folders)
    # Warm up with the same adapters and short answers, so that loads and first-use work are over.
    _burst(prepared, uses, options | {"output_tokens": 2}, seed=0)
    seconds, num_tokens = _burst(prepared, uses, options, seed=1)
    prepared.close()
    line = json.dumps(
        {
            "engine": f"loractl {options['quantize']}",
            "requests": options["num_requests"],
            "adapters": len(folders),
            "prompt_tokens": options["prompt_tokens"],
            "output_tokens": options["output_tokens"],
            "output_tokens_per_s": round(num_tokens / seconds, 1),
        }
    )
    click.echo(line)


def _adapter_folders(root: Path | None, count: int) -> list[Path]:
    if not count:
        return []
    if root is None:
        raise UsageError("--adapters is missing", hint="give a folder of adapters, or --distinct 0 for the bare base")
    found = sorted(path.parent for path in root.glob("*/adapter_config.json"))
    if len(found) < count:
        raise NotFound(f"{root}: {len(found)} adapters, --distinct asks for {count}")
    return found[:count]


def _prepare(base_folder: Path, folders: list[Path], options: dict[str, Any]) -> "Engine":
    from loractl.server.engine.base_model import load_base
    from loractl.server.engine.engine import Engine
    from loractl.server.engine.settings import EngineSettings

    settings = EngineSettings(
        num_slots=max(1, len(folders)),
        max_rank=options["max_rank"],
        max_running=min(64, options["num_requests"]),
        max_queue=options["num_requests"],
        prefix_cache=False,
    )
    return Engine(load_base(base_folder, quantization=options["quantize"]), settings)


def _uses(folders: list[Path]) -> "list[tuple[AdapterUse, ...]]":
    from loractl.adapters.digest import folder_digest
    from loractl.server.engine.messages import AdapterUse

    return [(AdapterUse(digest=folder_digest(folder), folder=folder),) for folder in folders] or [()]


def _burst(
    prepared: "Engine", uses: "list[tuple[AdapterUse, ...]]", options: dict[str, Any], *, seed: int
) -> tuple[float, int]:
    """Send all requests at once; return the seconds until the last has ended, and the tokens that came."""
    import random

    from loractl.server.engine.messages import Failed, RequestId, Sampling, Submit, Token

    tokens = random.Random(seed)  # noqa: S311 - prompts to measure with, no secret
    sampling = Sampling(max_tokens=options["output_tokens"], temperature=0.0, ignore_eos=True)
    num_open, num_tokens = options["num_requests"], 0
    started = time.perf_counter()
    for number in range(num_open):
        prompt = tuple(tokens.randrange(prepared.base.vocab_size) for _ in range(options["prompt_tokens"]))
        request_id = RequestId(f"{seed}-{number}")
        prepared.submit(Submit(id=request_id, prompt=prompt, sampling=sampling, adapters=uses[number % len(uses)]))
    while num_open:
        if not prepared.wait_for_work(1.0):
            continue
        for event in prepared.step().events:
            if isinstance(event, Failed):
                raise event.error
            num_tokens += isinstance(event, Token)
            num_open -= not isinstance(event, Token)
    return time.perf_counter() - started, num_tokens
