"""The recipe of a short run on a tiny base: four reviews, the article's settings, float32. Runs nothing."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loractl.adapters.training.recipe import Recipe, resolve_recipe

ROWS = [("a quick film", "positive"), ("a lazy dog", "negative"), ("great charm", "positive"), ("no sense", "negative")]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_recipe(folder: Path, base: Path, *, repeat: int = 1, **settings: Any) -> Recipe:
    """Write the reviews, `repeat` times over, into `folder`; the result goes to its `out`."""
    data = write_rows(folder / "rows.jsonl", [{"text": text, "label": label} for text, label in ROWS * repeat])
    given = {"base": str(base), "out": str(folder / "out"), "quantize": "none", "dtype": "float32"}
    parts = {"data.files": [str(data)], "data.eval_share": 0.25, "train.epochs": 4.0, "train.learning_rate": 1e-2}
    return resolve_recipe(preset="article", file=None, settings=given | parts | settings)
