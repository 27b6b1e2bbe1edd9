"""`loractl train` and `loractl plan`: flags to a recipe, progress to the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from loractl.cli.output import print_error, print_json, print_note
from loractl.cli.train_progress import ProgressPrinter


def _recipe_options(command: Any) -> Any:
    options = (
        click.argument("recipe", nargs=-1),
        click.option("--base", help="Base model: a folder in transformers' format, or a hub repo id."),
        click.option("--data", multiple=True, help="Training file, folder of files, or hf:ORG/NAME. May be repeated."),
        click.option("--eval-data", multiple=True, help="Rows to hold out, instead of a share of the others."),
        click.option("--out", type=click.Path(path_type=Path), help="Folder for the adapter."),
        click.option("--preset", help="Settings to start from; `loractl presets list` shows them."),
        click.option("--quantize", type=click.Choice(["int8", "nf4", "none"]), help="How the base is held. [int8]"),
        click.option("--targets", help="Modules by name, with commas, or all-linear."),
        click.option("--rank", type=int, help="Rank of the adapter."),
        click.option("--template", help='How columns become text: "Review: {text} Label: {label}".'),
        click.option("--from", "start_from", type=click.Path(path_type=Path), help="Adapter folder to start from."),
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any key of a recipe."),
        click.option("--json", "as_json", is_flag=True, help="JSON on stdout; train adds a line per step on stderr."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@_recipe_options
@click.option(
    "--sweep", multiple=True, metavar="KEY=V,V", help="Train every combination: --sweep lr=1e-4,3e-4 rank=8,16."
)
@click.option(
    "--resume", multiple=True, type=click.Path(path_type=Path), help="Go on with the unfinished run at this --out."
)
@click.option("--grouped", is_flag=True, help="Compute the rows of all adapters of a fleet in shared passes.")
@click.option("--tensorboard", type=click.Path(path_type=Path), help="Also write TensorBoard events below this folder.")
@click.option("--trackio", metavar="PROJECT", help="Also log to a trackio project.")
@click.pass_context
def train(
    ctx: click.Context,
    /,
    *,
    as_json: bool,
    sweep: tuple[str, ...],
    resume: tuple[Path, ...],
    grouped: bool,
    tensorboard: Path | None,
    trackio: str | None,
    **flags: Any,
) -> None:
    """Train LoRA adapters on a base model, one or many at once.

    Several recipes, or a sweep, train over one base in one process; Ctrl-C saves, and --resume goes on.

    \b
    Examples:
      loractl train --preset article --base BASE --data reviews.csv --out runs/reviews
      loractl train recipe.lock.yaml --set train.epochs=2
      loractl train a.yaml b.yaml
      loractl train recipe.yaml --out runs/sweep --sweep lr=1e-4,3e-4 rank=8,16
      loractl train --resume runs/reviews
      torchrun --nproc-per-node 2 -m loractl.cli train recipe.yaml
    """
    axes = sweep + tuple(name for name in flags["recipe"] if sweep and "=" in name)
    flags["recipe"] = tuple(Path(name) for name in flags["recipe"] if name not in axes)
    if resume:
        tasks = _tasks_to_resume(resume, flags)
    else:
        recipes = _fleet_recipes(flags, axes)
        from loractl.adapters.training.run import Task

        tasks = [Task(recipe) for recipe in recipes]
    from loractl.adapters.errors import Interrupted
    from loractl.adapters.training.run import run_fleet
    from loractl.adapters.training.saving import check_out
    from loractl.adapters.training.trackers import trackers

    for task in tasks:
        check_out(Path(task.recipe.out or "."))
    try:
        with ProgressPrinter(as_json=as_json) as printer, trackers(tensorboard=tensorboard, trackio=trackio) as more:
            listeners: list[Any] = [printer, *more]

            def listener(run: str, event: Any) -> None:
                for listen in listeners:
                    listen(run, event)

            outcomes = run_fleet(tasks, listener=listener, grouped=grouped)
    except Interrupted as stop:
        print_note(stop.message)
        print_note(f"resume: {stop.hint}")
        ctx.exit(stop.exit_code)
    ctx.exit(_report(tasks, outcomes, as_json=as_json))


def _report(tasks: Any, outcomes: Any, *, as_json: bool) -> int:
    """Print what became of each adapter; returns the first failure's exit code, else 0."""
    from loractl.adapters.errors import LoractlError

    exit_code, facts = 0, []
    for task, outcome in zip(tasks, outcomes, strict=False):  # processes beyond the first have no outcomes
        if isinstance(outcome, LoractlError):
            where = f"{task.recipe.out}: " if len(tasks) > 1 else ""
            print_error(where + outcome.message, hint=outcome.hint)
            exit_code = exit_code or outcome.exit_code
            facts.append({"folder": task.recipe.out, "error": outcome.message})
            continue
        facts.append({"folder": str(outcome.folder), "digest": outcome.digest} | outcome.manifest.metrics)
        if not as_json:
            click.echo(outcome.digest)
            held_out = outcome.manifest.metrics.get("eval_loss")
            print_note(f"saved {outcome.folder}" + (f"  held-out loss {held_out:.4f}" if held_out is not None else ""))
            print_note(f"next: loractl push {outcome.folder} TEAM/NAME")
    if as_json and facts:
        print_json(facts if len(tasks) > 1 else facts[0])
    return exit_code


@click.command()
@_recipe_options
@click.option("--probe", is_flag=True, help="Load the base and time two rows.")
@click.option("--server", metavar="URL", help="Also ask this server whether it will take the adapter.")
@click.option("--key", envvar="LORACTL_API_KEY", help="The server's API key, with the admin right.")
def plan(*, as_json: bool, probe: bool, server: str | None, key: str | None, **flags: Any) -> int:
    """Say what `train` would do, with memory and steps; loads no weights.

    Exits with 4 where the run would not fit in memory, with 5 where the server would refuse its adapter.

    \b
    Examples:
      loractl plan --preset article --base BASE --data reviews.csv
      loractl plan recipe.yaml --probe --server http://127.0.0.1:8800
    """
    from dataclasses import asdict, replace

    from loractl.adapters.errors import Incompatible, WillNotFit
    from loractl.adapters.training.planning import make_plan, probe_seconds
    from loractl.adapters.training.run import prepare, resolve_numbers
    from loractl.cli.plan_text import plan_lines, server_line

    recipe = _recipe(flags | {"recipe": Path(flags["recipe"][0]) if flags["recipe"] else None})
    inputs = prepare(resolve_numbers(recipe))
    made = make_plan(recipe, inputs)
    if probe:
        print_note("loading the base for the probe ...")
        made = replace(made, seconds=probe_seconds(recipe, inputs, made))
    findings = _asked(made, server.rstrip("/"), key) if server else []
    refused = any(one.fits is False for one in findings)
    if as_json:
        memory = {name: asdict(part) | {"total": part.total} for name, part in _memories(made)}
        print_json(asdict(made) | memory | {"fits": made.fits, "server": [asdict(one) for one in findings]})
    else:
        for line in plan_lines(made) + ([server_line(findings)] if findings else []):
            click.echo(line)
        print_note("plan ok" if made.fits and not refused else "this plan will not do")
    if refused:
        return Incompatible.exit_code
    return 0 if made.fits else WillNotFit.exit_code


def _asked(made: Any, server: str, key: str | None) -> list[Any]:
    """What the server says to the plan; one that does not answer leaves the plan unchecked, not undone."""
    from loractl.adapters.errors import Unreachable
    from loractl.cli.plan_server import compare_with_server

    try:
        return compare_with_server(made, server, key)
    except Unreachable as error:
        print_note(f"unchecked: {error.message}")
        return []


def _memories(made: Any) -> list[tuple[str, Any]]:
    return [("memory", made.memory), ("full_fine_tuning", made.full_fine_tuning)]


def _fleet_recipes(flags: dict[str, Any], axes: tuple[str, ...]) -> list[Any]:
    """Resolve every recipe of a fleet; flags apply to each, and --out is then the folder of all results."""
    from loractl.adapters.errors import BadRecipe
    from loractl.adapters.training.sweep import sweep_settings

    files = flags["recipe"] or (None,)
    points = sweep_settings(axes) if axes else [("", {})]
    out, many = flags["out"], len(files) * len(points) > 1
    recipes = []
    for file in files:
        for name, settings in points:
            recipe = _recipe(flags | {"recipe": file}, settings)
            if many and (axes or out):
                if not recipe.out:
                    raise BadRecipe("no place for the results", hint="--out DIR holds one folder for each")
                parts = [file.stem if file and len(files) > 1 else "", name]
                recipe.out = str(Path(recipe.out) / "-".join(part for part in parts if part))
            recipes.append(recipe)
    return recipes


def _tasks_to_resume(folders: tuple[Path, ...], flags: dict[str, Any]) -> Any:
    from loractl.adapters.errors import Conflict
    from loractl.adapters.training.recipe import first_difference, parse_setting, with_settings
    from loractl.adapters.training.run import tasks_to_resume

    tasks = tasks_to_resume(folders)
    given = _named(flags) | dict(parse_setting(text) for text in flags["settings"])
    if flags["recipe"] or flags["preset"]:
        given |= _flatten(_recipe(flags | {"recipe": flags["recipe"][0] if flags["recipe"] else None}))
    # What was left open then is decided by now.
    given = {key: value for key, value in given.items() if value is not None and value != "auto"}
    for key in ("base", "out", "data.files", "data.eval_files", "adapter.start_from"):
        given.pop(key, None)  # the checkpoint knows these by whole paths, and checks their content
    for task in tasks:
        difference = first_difference(task.recipe, with_settings(task.recipe, given))
        if difference:
            raise Conflict(
                f"{task.recipe.out}: at the checkpoint {difference}",
                hint="a run goes on with its own settings; begin anew with other ones",
            )
    return tasks


def _flatten(recipe: Any) -> dict[str, Any]:
    from loractl.adapters.training.recipe import flat_settings

    return flat_settings(recipe)


def _recipe(flags: dict[str, Any], more: Mapping[str, Any] | None = None) -> Any:
    from loractl.adapters.training.recipe import parse_setting, resolve_recipe

    settings = _named(flags) | dict(parse_setting(text) for text in flags["settings"]) | dict(more or {})
    return resolve_recipe(preset=flags["preset"], file=flags["recipe"], settings=settings)


def _named(flags: dict[str, Any]) -> dict[str, Any]:
    """The settings that have flags of their own, where they were given."""
    named = {
        "base": flags["base"],
        "out": str(flags["out"]) if flags["out"] else None,
        "quantize": flags["quantize"],
        "data.files": list(flags["data"]) or None,
        "data.eval_files": list(flags["eval_data"]) or None,
        "data.template": flags["template"],
        "adapter.targets": flags["targets"].split(",") if flags["targets"] else None,
        "adapter.rank": flags["rank"],
        "adapter.start_from": str(flags["start_from"]) if flags["start_from"] else None,
    }
    return {key: value for key, value in named.items() if value is not None}
