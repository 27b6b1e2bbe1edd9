"""`loractl data check|show|split|digest`: training data, before anything is trained. Click only."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loractl.cli.context import json_option
from loractl.cli.marking import marked
from loractl.cli.output import print_json, print_note

if TYPE_CHECKING:
    from loractl.adapters.training.recipe import DataPart
    from loractl.adapters.training.rows import Row

_FILES = click.argument("files", nargs=-1, required=True, metavar="FILE...")
_TEMPLATE = click.option("--template", help='How columns become text: "Review: {text} Label: {label}".')
_SHARE = click.option(
    "--share", type=click.FloatRange(0, 0.5), default=0.05, show_default=True, help="Part to hold out."
)


@click.group(short_help="Look at training data: check, show, split, digest.")
def data() -> None:
    """Look at training data: check, show, split, digest.

    A FILE is .jsonl, .json, .csv, .tsv or .parquet, a folder of them, or a hub dataset as hf:ORG/NAME.
    """


@data.command()
@_FILES
@click.option("--base", help="Base whose tokenizer and template count; without it only rows are looked at.")
@_TEMPLATE
@click.option("--max-tokens", type=click.IntRange(8), help="Longest row. [the base's window]")
@click.option("--overlong", type=click.Choice(["auto", "drop", "truncate", "error"]), default="auto", show_default=True)
@json_option
def check(*, files: tuple[str, ...], base: str | None, as_json: bool, **settings: Any) -> None:
    """Check every row and say what training would see.

    \b
    Examples:
      loractl data check reviews.csv
      loractl data check chats.jsonl --base BASE --max-tokens 2048
    """
    rows, part = _rows(files, settings["template"], overlong=settings["overlong"])
    if base is None:
        facts = _row_facts(rows)
        if as_json:
            print_json(facts)
            return
        click.echo(
            f"{facts['num_rows']:,} rows {facts['form']}, {facts['num_duplicates']:,} duplicates  {facts['digest']}"
        )
        print_note("--base BASE also counts tokens and what is learned of them")
        return
    from loractl.adapters.training.data_summary import summarize
    from loractl.adapters.training.examples import prepare_examples

    tokenizer, window = _tokenizer(base)
    prepared = prepare_examples(rows, tokenizer, part, max_tokens=settings["max_tokens"] or window)
    summary = summarize(rows, prepared, train=prepared.examples, num_eval_rows=0)
    if as_json:
        print_json(_row_facts(rows) | asdict(summary))
        return
    click.echo(summary.sentence())


@data.command()
@_FILES
@click.option("--base", required=True, help="Base whose tokenizer and template count.")
@click.option("--row", "number", type=click.IntRange(1), default=1, show_default=True, help="Which row, from 1.")
@_TEMPLATE
def show(*, files: tuple[str, ...], base: str, number: int, template: str | None) -> None:
    """Print a row as the model sees it, with what is learned in bold.

    \b
    Examples:
      loractl data show reviews.csv --base BASE --row 3
    """
    from loractl.adapters.errors import UsageError
    from loractl.adapters.training.examples import make_example, marked_text

    rows, part = _rows(files, template)
    if number > len(rows):
        raise UsageError(f"there is no row {number}", hint=f"rows are 1 to {len(rows)}")
    row = rows[number - 1]
    tokenizer, _ = _tokenizer(base)
    example = make_example(row, tokenizer, part)
    click.echo(marked(marked_text(example, tokenizer), err=False))
    last = max(index for index, learned in enumerate(example.learned) if learned)
    ends = "yes" if example.ids[last] == tokenizer.eos_token_id else "no"
    print_note(
        f"{row.place}: {row.form}; learned {example.num_learned} of {example.num_tokens} tokens, "
        f"ends with stop token: {ends}"
    )


@data.command()
@_FILES
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the two files."
)
@_SHARE
@click.option("--seed", type=int, default=0, show_default=True, help="Which rows are drawn.")
@_TEMPLATE
def split(*, files: tuple[str, ...], out: Path, share: float, seed: int, template: str | None) -> None:
    """Write train.jsonl and eval.jsonl; rows of one conversation stay together.

    \b
    Examples:
      loractl data split chats.jsonl --out split --share 0.1
      loractl train --data split/train.jsonl --eval-data split/eval.jsonl ...
    """
    from loractl.adapters.errors import UsageError
    from loractl.adapters.training.splitting import split_rows

    rows, _ = _rows(files, template)
    train, held_out = split_rows(rows, share=share, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    for name, numbers in (("train.jsonl", train), ("eval.jsonl", held_out)):
        path = out / name
        if path.exists():
            raise UsageError(f"{path} exists", hint="name a new folder")
        lines = (json.dumps(dict(rows[number].fields), ensure_ascii=False) for number in numbers)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print_note(f"{path}: {len(numbers):,} rows")
        click.echo(path)


@data.command()
@_FILES
@_TEMPLATE
@json_option
def digest(*, files: tuple[str, ...], template: str | None, as_json: bool) -> None:
    """Print the digest that an adapter's record keeps of its rows, whatever their order.

    \b
    Examples:
      loractl data digest reviews.csv
    """
    facts = _row_facts(_rows(files, template)[0])
    if as_json:
        print_json(facts)
        return
    click.echo(facts["digest"])


def _rows(files: tuple[str, ...], template: str | None, **settings: Any) -> "tuple[list[Row], DataPart]":
    from loractl.adapters.training.examples import template_columns
    from loractl.adapters.training.recipe import resolve_recipe
    from loractl.adapters.training.rows import read_all_rows

    given = {"data.files": list(files), "data.template": template} | {f"data.{key}": settings[key] for key in settings}
    part = resolve_recipe(preset=None, file=None, settings=given).data
    return read_all_rows(files, columns=template_columns(template)), part


def _row_facts(rows: "list[Row]") -> dict[str, Any]:
    from loractl.adapters.training.data_summary import num_duplicates
    from loractl.adapters.training.rows import rows_digest

    return {
        "form": rows[0].form,
        "num_rows": len(rows),
        "num_duplicates": num_duplicates(rows),
        "digest": rows_digest(rows),
    }


def _tokenizer(base: str) -> tuple[Any, int]:
    from loractl.adapters.base_identity import base_window
    from loractl.adapters.base_loading import load_tokenizer
    from loractl.adapters.base_source import resolve_base

    folder = resolve_base(base).folder
    return load_tokenizer(folder), base_window(json.loads((folder / "config.json").read_text()))
