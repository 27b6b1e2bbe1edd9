"""What a person sees: data on stdout, everything else on stderr, readable without colour."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click


def print_error(message: str, *, hint: str | None = None) -> None:
    """Print `error: ...` and, a blank line below, `hint: ...` on stderr."""
    click.echo(click.style("error", fg="red", bold=True) + f": {message}", err=True)
    if hint:
        click.echo("", err=True)
        click.echo(click.style("hint", fg="cyan", bold=True) + f": {hint}", err=True)


def print_note(message: str) -> None:
    """Print one line for people on stderr."""
    click.echo(message, err=True)


def print_json(value: object) -> None:
    """Print one JSON document on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], *, as_json: bool, empty: str) -> None:
    """Print rows as an aligned table, or as a JSON array; `empty` is what people read when there is none."""
    if as_json:
        print_json([dict(row) for row in rows])
        return
    if not rows:
        print_note(empty)
        return
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    click.echo("  ".join(column.upper().ljust(width) for column, width in zip(columns, widths, strict=True)).rstrip())
    for line in cells:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def is_interactive() -> bool:
    """Tell whether a person watches stderr, so that progress bars make sense."""
    return sys.stderr.isatty()


def percent(share: float) -> str:
    """A share between 0 and 1, for people."""
    return f"{share * 100:.3g}%"
