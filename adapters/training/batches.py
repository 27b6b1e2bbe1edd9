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
# Rows are put one behind the other up to so many tokens: attention costs little until there, padding is spared.
_PACKED_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Tensors:
    """Rows padded to the longest: `ids` and `learned`, each [rows, tokens].

    `attended` [rows, tokens] tells padding. It is None where several rows lie one behind the other: `positions`
    [rows, tokens] tell those apart by beginning anew, by which transformers masks one from the other.
    """

    ids: "torch.Tensor"
    learned: "torch.Tensor"
    attended: "torch.Tensor | None" = None
    positions: "torch.Tensor | None" = None


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
        is_full = len(micro) >= num_rows and math.prod(pass_shape([*micro, example], packed=False)) > num_tokens
        if is_full or len(micro) == max_rows:
            yield micro
            micro = []
        micro.append(example)
    if micro:
        yield micro


def pass_shape(micro: Sequence[Example], *, packed: bool) -> tuple[int, int]:
    """Rows and tokens of what goes through the model for rows in the order of their lengths.

    `packed` is whether the model tells rows apart that lie one behind the other; pairs are never packed.
    """
    if packed and all(example.rejected is None for example in micro):
        packs = pack(micro)
        return len(packs), max(map(_num_tokens, packs))
    return sum(len(example.sequences) for example in micro), micro[-1].longest


def pack(rows: Sequence[Example]) -> list[list[Example]]:
    """Put rows into as few packs as hold them, all of about one length; each row its own pack where that pads less."""
    longest = max(len(example.ids) for example in rows)
    num_packs = math.ceil(_num_tokens(rows) / max(longest, _PACKED_TOKENS))
    packs: list[list[Example]] = [[] for _ in range(num_packs)]
    for example in sorted(rows, key=lambda example: -len(example.ids)):
        min(packs, key=_num_tokens).append(example)
    if num_packs * max(map(_num_tokens, packs)) < len(rows) * longest:
        return packs
    return [[example] for example in rows]


def _num_tokens(rows: Sequence[Example]) -> int:
    return sum(len(example.ids) for example in rows)


def collate(batch: Sequence[Example], device: "torch.device") -> Tensors:
    """Pad rows at their end; padding is told by position, never by a token's id."""
    import torch

    tensors = collate_packs([[example] for example in batch], device)
    lengths = torch.tensor([len(example.ids) for example in batch])
    attended = (torch.arange(tensors.ids.shape[1]) < lengths.unsqueeze(1)).long()
    return Tensors(tensors.ids, tensors.learned, attended=attended.to(device))


def collate_packs(packs: Sequence[Sequence[Example]], device: "torch.device") -> Tensors:
    """Lay the rows of each pack one behind the other; every token of the padding is a row of its own."""
    import torch

    longest = max(map(_num_tokens, packs))
    ids = torch.zeros(len(packs), longest, dtype=torch.long)
    positions = torch.zeros(len(packs), longest, dtype=torch.long)
    learned = torch.zeros(len(packs), longest, dtype=torch.bool)
    for number, rows in enumerate(packs):
        start = 0
        for example in rows:
            stop = start + len(example.ids)
            ids[number, start:stop] = torch.tensor(example.ids)
            positions[number, start:stop] = torch.arange(len(example.ids))
            learned[number, start:stop] = torch.tensor(example.learned)
            learned[number, start] = False  # nothing comes before the first token, so nothing predicts it
            start = stop
    return Tensors(ids.to(device), learned.to(device), positions=positions.to(device))
