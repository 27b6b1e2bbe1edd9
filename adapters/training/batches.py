"""Which rows each optimizer step sees, and how they are cut into what goes through the model at once. Loads none."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loractl.adapters.training.examples import Example
from loractl.adapters.training.recipe import TrainPart

if TYPE_CHECKING:
    import torch

MICRO_BATCH_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Tensors:
    """Rows padded to the longest: `ids`, `attended` and `learned`, each [rows, tokens]."""

    ids: "torch.Tensor"
    attended: "torch.Tensor"
    learned: "torch.Tensor"


def num_steps(num_rows: int, train: TrainPart) -> int:
    """Count the optimizer steps of a run."""
    return max(1, math.ceil(num_rows * train.epochs / (train.batch_size * train.accumulation)))


def step_rows(num_rows: int, train: TrainPart) -> Iterator[list[int]]:
    """Yield each optimizer step's row numbers: every epoch in an order of its own, drawn from the seed."""
    size = train.batch_size * train.accumulation
    order: list[int] = []
    generator = random.Random(train.seed)  # noqa: S311 - an order that can be repeated, not a secret
    for _ in range(num_steps(num_rows, train)):
        while len(order) < size:
            epoch = list(range(num_rows))
            generator.shuffle(epoch)
            order += epoch
        taken, order = order[:size], order[size:]
        yield taken


def micro_batches(
    batch: Sequence[Example], *, num_rows: int, num_tokens: int, max_rows: int | None = None
) -> Iterator[list[Example]]:
    """Split a step's rows by length: at least `num_rows` together, more while they fit, so little is padded.

    A pair counts as one row, and its two answers stay together. `max_rows` is a limit above both, for when memory ran
    out.
    """
    ordered = sorted(batch, key=lambda example: example.longest)
    micro: list[Example] = []
    for example in ordered:
        is_full = len(micro) >= num_rows and padded_tokens([*micro, example]) > num_tokens
        if is_full or len(micro) == max_rows:
            yield micro
            micro = []
        micro.append(example)
    if micro:
        yield micro


def padded_tokens(micro: Sequence[Example]) -> int:
    """Count the tokens that go through the model for rows in the order of their lengths, padding included."""
    return sum(len(example.sequences) for example in micro) * micro[-1].longest


def collate(batch: Sequence[Example], device: "torch.device") -> Tensors:
    """Pad rows at their end; padding is told by position, never by a token's id."""
    import torch

    longest = max(len(example.ids) for example in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    attended = torch.zeros(len(batch), longest, dtype=torch.long)
    learned = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, example in enumerate(batch):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        attended[row, :length] = 1
        learned[row, :length] = torch.tensor(example.learned)
    learned[:, 0] = False  # nothing comes before the first token, so nothing predicts it
    return Tensors(ids.to(device), attended.to(device), learned.to(device))
