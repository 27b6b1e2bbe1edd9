"""Holds rows out, whole conversations at a time. Knows no tokens and no files."""

import random
from collections.abc import Sequence

from loractl.adapters.training.rows import Row


def split_rows(rows: Sequence[Row], *, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the numbers of the rows to train on and of those held out, about `share` of all, drawn from the seed.

    Rows of one conversation, and rows that begin alike, are on the same side.
    """
    wanted = round(len(rows) * share)
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row.conversation, []).append(number)
    order = list(groups.values())
    random.Random(seed).shuffle(order)  # noqa: S311 - a split that can be repeated, not a secret
    held_out: set[int] = set()
    for group in order:
        if len(held_out) + len(group) <= wanted:
            held_out.update(group)
    if wanted and not held_out:
        # Every group is larger than what is wanted: rows that begin alike are then all there is.
        numbers = list(range(len(rows)))
        random.Random(seed).shuffle(numbers)  # noqa: S311
        held_out.update(numbers[:wanted])
    return [number for number in range(len(rows)) if number not in held_out], sorted(held_out)
