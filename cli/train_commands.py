"""`loractl train` and `loractl plan`: flags to a recipe, progress to the terminal."""

import json
import time
from pathlib import Path
from typing import Any, Self

import click

from loractl.cli.output import is_interactive, print_json, print_note

_EVERY_S = 3.0


def _recipe_options(command: Any) -> Any:
    options = (
        click.argument("recipe", required=False, type=click.Path(path_type=Path, dir_okay=False)),
        click.option("--base", help="Base model: a folder in transformers' format, or a hub repo id."),
        click.option("--data", multiple=True, help="Training file: .jsonl, .json, .csv or .tsv. May be repeated."),
        click.option("--out", type=click.Path(path_type=Path), help="Folder for the adapter."),
        click.option("--preset", help="Settings to start from: article, quick."),
        click.option("--quantize", type=click.Choice(["int8", "nf4", "none"]), help="How the base is held. [int8]"),
        click.option("--targets", help="Modules by name, with commas, or all-linear."),
        click.option("--rank", type=int, help="Rank of the adapter."),
        click.option("--template", help="How a row of text and label becomes text."),
        click.option("--from", "start_from", type=click.Path(path_type=Path), help="Adapter folder to start from."),
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any key of a recipe."),
        click.option("--json", "as_json", is_flag=True, help="JSON on stdout; train adds a line per step on stderr."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@_recipe_options
def train(*, as_json: bool, **flags: Any) -> None:
    """Train a LoRA adapter on a base model.

    \b
    Examples:
      loractl train --preset article --base BASE --data reviews.csv --out runs/reviews
      loractl train recipe.lock.yaml --set train.epochs=2
    """
    recipe = _recipe(flags)
    from loractl.adapters.training.run import run
    from loractl.adapters.training.saving import check_out

    check_out(Path(recipe.out or "."))
    with ProgressPrinter(as_json=as_json) as listener:
        outcome = run(recipe, listener=listener)
    facts = {"folder": str(outcome.folder), "digest": outcome.digest} | outcome.manifest.metrics
    if as_json:
        print_json(facts)
    else:
        click.echo(outcome.digest)
        print_note(f"saved {outcome.folder}")
        print_note(f"next: loractl push {outcome.folder} TEAM/NAME")


@click.command()
@_recipe_options
def plan(*, as_json: bool, **flags: Any) -> None:
    """Say what `train` would do, with memory and steps; loads no weights.

    \b
    Example:
      loractl plan --preset article --base BASE --data reviews.csv
    """
    recipe = _recipe(flags)
    from loractl.adapters.training.planning import make_plan

    facts = make_plan(recipe)
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        click.echo(f"{name:<24} {value:,}" if isinstance(value, int) else f"{name:<24} {value}")


def _recipe(flags: dict[str, Any]) -> Any:
    from loractl.adapters.training.recipe import parse_setting, resolve_recipe

    settings: dict[str, Any] = {}
    named = {
        "base": flags["base"],
        "out": str(flags["out"]) if flags["out"] else None,
        "quantize": flags["quantize"],
        "data.files": list(flags["data"]) or None,
        "data.template": flags["template"],
        "adapter.targets": flags["targets"].split(",") if flags["targets"] else None,
        "adapter.rank": flags["rank"],
        "adapter.start_from": str(flags["start_from"]) if flags["start_from"] else None,
    }
    settings |= {key: value for key, value in named.items() if value is not None}
    settings |= dict(parse_setting(text) for text in flags["settings"])
    return resolve_recipe(preset=flags["preset"], file=flags["recipe"], settings=settings)


class ProgressPrinter:
    """Shows progress: a bar on a terminal, a line every few seconds elsewhere, JSON lines when asked."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._shown_at = 0.0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if not self._as_json:
            print_note("loading the base ...")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Any) -> None:
        from dataclasses import asdict

        from loractl.adapters.training.events import Evaluated, Started, Stepped

        if self._as_json:
            click.echo(json.dumps({"event": type(event).__name__.lower()} | asdict(event)), err=True)
        elif isinstance(event, Started):
            self._show_start(event)
        elif isinstance(event, Stepped):
            self._show_step(event)
        elif isinstance(event, Evaluated):
            self._note(f"held-out loss {event.loss:.4f}")

    def _note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print_note(text)

    def _show_start(self, event: Any) -> None:
        dropped = f", {event.num_overlong_rows} left out as too long" if event.num_overlong_rows else ""
        print_note(
            f"{event.num_rows} rows{dropped}, {event.num_eval_rows} held out; {event.num_tokens:,} tokens, "
            f"{event.num_learned_tokens:,} learned; {event.num_parameters:,} parameters; {event.num_steps} steps"
        )
        if is_interactive():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                TextColumn(
                    "{task.completed}/{task.total}  loss {task.fields[loss]:.3f}  {task.fields[rate]:.0f} tok/s"
                ),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("training", total=event.num_steps, loss=0.0, rate=0.0)
            self._bar.start()

    def _show_step(self, event: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=event.step, loss=event.loss, rate=event.tokens_per_s)
        elif event.step in {1, event.num_steps} or time.monotonic() - self._shown_at >= _EVERY_S:
            self._shown_at = time.monotonic()
            print_note(
                f"step {event.step}/{event.num_steps}  loss {event.loss:.3f}  "
                f"lr {event.learning_rate:.1e}  {event.tokens_per_s:.0f} tokens/s"
            )
