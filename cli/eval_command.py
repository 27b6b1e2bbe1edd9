"""`loractl eval`: adapters and their base scored on the same rows. Click only."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from loractl.cli.context import adapter_folder, hub_option, json_option
from loractl.cli.output import print_json, print_note, print_table

# How --compare names the ways a base is held: (quantization, dtype).
_HELD = {
    "int8": ("int8", "auto"),
    "nf4": ("nf4", "auto"),
    "none": ("none", "auto"),
    "bf16": ("none", "bfloat16"),
    "fp32": ("none", "float32"),
}


@click.command("eval", short_help="Score adapters and their base on the same rows.")
@click.argument("adapters", nargs=-1, metavar="REF|DIR...")
@click.option("--base", required=True, help="The base they belong to: a folder, or a hub repo id.")
@click.option("--data", "files", multiple=True, required=True, help="Rows to score on. May be repeated.")
@click.option(
    "--template", help='How columns become text; else the first adapter\'s own: "Review: {text} Label: {label}".'
)
@click.option("--quantize", type=click.Choice(["int8", "nf4", "none"]), help="How the base is held. [int8]")
@click.option("--compare", metavar="HOW,HOW", help=f"Score once for each way to hold the base: {', '.join(_HELD)}.")
@click.option("--rows", "limit", type=click.IntRange(1), help="Only so many rows, from the first.")
@click.option(
    "--generate", type=click.Path(path_type=Path, dir_okay=False), help="Also write everybody's answers here."
)
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True, help="Longest written answer.")
@click.option("--record", is_flag=True, help="Write the metrics into the loractl.json of each DIR.")
@hub_option
@json_option
def evaluate(*, adapters: tuple[str, ...], hub_url: str | None, as_json: bool, **flags: Any) -> None:
    """Score adapters and their base on the same rows.

    Rows of all adapters go through the base together. Accuracy is over the labels in the data, or over each
    row's own choices.

    \b
    Examples:
      loractl eval runs/reviews --base BASE --data held-out.csv
      loractl eval team/a@prod runs/b --base BASE --data held-out.csv --json
      loractl eval --base BASE --data held-out.csv --compare int8,bf16
    """
    folders = [(name, adapter_folder(name, hub_url)) for name in dict.fromkeys(adapters)]
    ways = [way.strip() for way in (flags["compare"] or flags["quantize"] or "int8").split(",")]
    from loractl.adapters.errors import UsageError

    for way in ways:
        if way not in _HELD:
            raise UsageError(f"--compare {way}: no such way to hold a base", hint=", ".join(_HELD))
    scores: list[dict[str, Any]] = []
    digest = ""
    for way in ways:
        found, digest = _scores(folders, way, flags, writes=way == ways[0])
        scores += [{"held": way} | score for score in found]
    if flags["record"]:
        _record(folders, scores, digest)
    if as_json:
        print_json(scores)
        return
    columns = ["adapter", "held", "loss", "exact_match", "accuracy", "num_rows"]
    print_table(columns, [{"adapter": one["name"]} | one for one in scores], as_json=False, empty="")


def _scores(
    folders: list[tuple[str, Path]], way: str, flags: dict[str, Any], *, writes: bool
) -> tuple[list[dict[str, Any]], str]:
    """Score once; returns the figures, and the digest of the rows."""
    from loractl.adapters.base_loading import load_base_model, load_tokenizer, quiet_libraries
    from loractl.adapters.base_source import resolve_base

    quiet_libraries()  # before PEFT imports what speaks
    from loractl.adapters.training.evaluation_data import evaluation_data
    from loractl.adapters.training.rows import rows_digest
    from loractl.adapters.training.scoring import Scorer, timed_scores

    base = resolve_base(flags["base"])
    rows, part = evaluation_data(base, folders, flags["files"], template=flags["template"], limit=flags["limit"])
    quantization, dtype = _HELD[way]
    print_note(f"loading {base.id} as {way} ...")
    tokenizer = load_tokenizer(base.folder)
    model = load_base_model(base.folder, quantization=quantization, dtype=dtype)  # type: ignore[arg-type]
    scorer = Scorer(model, folders)
    scores, seconds = timed_scores(scorer, rows, tokenizer, part)
    together = "in shared passes" if scorer.shares_passes else "one by one"
    print_note(f"{len(rows)} rows x {len(scorer.names)} in {seconds:.1f} s, {together}")
    if flags["generate"] and writes:
        _write_answers(scorer, rows, tokenizer, part, flags)
    return [asdict(score) for score in scores], rows_digest(rows)


def _write_answers(scorer: Any, rows: Any, tokenizer: Any, part: Any, flags: dict[str, Any]) -> None:
    from loractl.adapters.training.scoring import written_answers

    num_lines = 0
    with flags["generate"].open("w", encoding="utf-8") as file:
        for line in written_answers(scorer, rows, tokenizer, part, max_new_tokens=flags["max_new_tokens"]):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            num_lines += 1
    print_note(f"wrote {num_lines} answers to {flags['generate']}")


def _record(folders: list[tuple[str, Path]], scores: list[dict[str, Any]], digest: str) -> None:
    """Put the first way's figures, and on which rows they are, into the manifests of the folders that were named."""
    from loractl.adapters.manifest import Manifest, load_manifest, save_manifest

    for name, folder in folders:
        if folder != Path(name):
            print_note(f"{name} is the hub's; nothing is recorded")
            continue
        score = next(one for one in scores if one["name"] == name)
        manifest = load_manifest(folder) or Manifest()
        figures = {
            f"eval_{key}": round(score[key], 6) for key in ("loss", "exact_match", "accuracy") if score[key] is not None
        }
        manifest.metrics |= figures
        manifest.measured_on |= dict.fromkeys(figures, digest)
        save_manifest(manifest, folder)
        print_note(f"recorded in {folder}/loractl.json")
