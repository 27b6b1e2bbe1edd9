"""The mean loss per learned token over held-out rows. Knows no optimizer."""

from collections.abc import Sequence
from typing import Any

import torch

from loractl.adapters.training.distributed import World
from loractl.adapters.training.examples import Example
from loractl.adapters.training.loss import summed_loss

_BATCH_ROWS = 16


def evaluate(model: Any, examples: Sequence[Example], *, world: World | None = None) -> float:
    """Return the mean loss per learned token, in eval mode: the arithmetic that serves."""
    world = world or World()
    model.eval()
    total, num_learned = 0.0, 0
    ordered = sorted(world.share(examples), key=lambda example: len(example.ids))
    with torch.inference_mode():
        for start in range(0, len(ordered), _BATCH_ROWS):
            batch = ordered[start : start + _BATCH_ROWS]
            total += summed_loss(model, batch).item()
            num_learned += sum(sum(example.learned[1:]) for example in batch)
    total, count = world.sum([total, num_learned])
    return total / max(1.0, count)
