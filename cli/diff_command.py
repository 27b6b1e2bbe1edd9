"""`loractl diff`: two revisions side by side. Click only; the hub compares."""

import json
from typing import Any

import click
import msgspec

from loractl.adapters.reference import parse_reference
from loractl.cli.context import hub_option, json_option, open_hub
from loractl.cli.output import print_json, print_note, print_table


@click.command(short_help="Compare two revisions: recipe, data, metrics, targets, weights.")
@click.argument("a", metavar="REF")
@click.argument("b", metavar="REF")
@hub_option
@json_option
def diff(*, a: str, b: str, hub_url: str | None, as_json: bool) -> None:
    """Compare two revisions: recipe, data, metrics, targets, weights.

    For each layer it prints the norm of the change that either adapter makes to the base's weight, and the norm of the
    difference of the two.

    \b
    Examples:
      loractl diff demo/movies@v1 demo/movies@v2
      loractl diff demo/movies@prod demo/movies@main --json | jq .metrics
    """
    with open_hub(hub_url) as hub:
        found = hub.diff(parse_reference(a), parse_reference(b))
    if as_json:
        print_json(msgspec.to_builtins(found))
        return
    if found.a.digest == found.b.digest:
        print_note(f"{a} and {b} are the same adapter")
    rows = [
        {"part": part, "name": one.name, "a": _short(one.a), "b": _short(one.b)}
        for part in ("config", "recipe", "data", "metrics")
        for one in getattr(found, part)
    ]
    rows += [{"part": "targets", "name": name, "a": "yes"} for name in found.targets_only_in_a]
    rows += [{"part": "targets", "name": name, "b": "yes"} for name in found.targets_only_in_b]
    print_table(
        ["part", "name", "a", "b"], rows, as_json=False, empty="configuration, recipe, data, metrics: no difference"
    )
    layers = [msgspec.to_builtins(layer) for layer in found.layers]
    click.echo("")
    print_table(["module", "a", "b", "difference"], layers, as_json=False, empty="no weights to compare")
    if found.difference is not None:
        print_note(f"all layers together differ by {found.difference:.4g}")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
