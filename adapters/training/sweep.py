"""A sweep: one recipe times every combination of some settings, as recipes of a fleet. Knows no model."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from loractl.adapters.errors import BadRecipe

ALIASES = {
    "lr": "train.learning_rate",
    "rank": "adapter.rank",
    "alpha": "adapter.alpha",
    "dropout": "adapter.dropout",
    "epochs": "train.epochs",
    "batch": "train.batch_size",
    "seed": "train.seed",
}


def sweep_settings(axes: Sequence[str]) -> list[tuple[str, Mapping[str, Any]]]:
    """Turn `lr=1e-4,3e-4` and `rank=8,16` into (folder name, settings) of each combination; raises BadRecipe."""
    parsed: list[tuple[str, str, list[Any]]] = []
    for axis in axes:
        name, equals, values = axis.partition("=")
        if not (name and equals and values):
            raise BadRecipe(
                f"--sweep {axis!r} is not KEY=VALUE,VALUE", hint="for example --sweep lr=1e-4,3e-4 rank=8,16"
            )
        key = ALIASES.get(name, name)
        if "." not in key:
            raise BadRecipe(
                f"--sweep {name}: no such setting", hint=f"{', '.join(ALIASES)}, or a key such as train.warmup"
            )
        parsed.append((name.rpartition(".")[2], key, [_value(text) for text in values.split(",")]))
    return [
        (
            "-".join(f"{name}{value}" for (name, _, _), value in zip(parsed, chosen, strict=True)),
            {key: value for (_, key, _), value in zip(parsed, chosen, strict=True)},
        )
        for chosen in itertools.product(*(values for _, _, values in parsed))
    ]


def _value(text: str) -> Any:
    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except ValueError:
        return yaml.safe_load(text)
