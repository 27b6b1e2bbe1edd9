"""Rows of many adapters in one forward pass: the base's products are done once over all rows. Knows no files.

Rows lie by owner. Every LoRA layer multiplies all of them by the base's weight at once, and each owner's rows by its
own A and B, whatever the ranks and wherever an adapter has no such layer. The rows of one step have one loss; its
gradient falls apart into the adapters' own, for no weight is shared. Products over all adapters with a mask would be
fewer, but a member that overflows would turn its neighbours' gradients into NaN: zero times infinity.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer

from loractl.adapters.errors import Diverged, Unsupported
from loractl.adapters.training.batches import MICRO_BATCH_TOKENS, collate
from loractl.adapters.training.examples import Example
from loractl.adapters.training.loss import learned_positions, position_losses
from loractl.adapters.training.member import Member, learned_tokens


@dataclass(frozen=True, slots=True)
class _Row:
    owner: int
    example: Example


def check_groupable(members: Sequence[Member]) -> None:
    """Raise Unsupported naming the first member that only a pass of its own can train."""
    for member in members:
        part = member.recipe.adapter
        if member.reference is not None:
            raise Unsupported(f"{member.recipe.out}: pairs (DPO) cannot share a forward pass", hint="without --grouped")
        if part.dora or part.init in {"pissa", "olora"}:
            what = "dora" if part.dora else f"init={part.init}"
            raise Unsupported(
                f"{member.recipe.out}: adapter.{what} cannot share a forward pass", hint="without --grouped"
            )


def grouped_step(members: Sequence[Member]) -> list[tuple[Member, Diverged]]:
    """Do one optimizer step of every member in shared passes; returns those that diverged, the others have stepped."""
    start = time.perf_counter()
    model = members[0].trunk.model
    members[0].trunk.activate_group([member.name for member in members])
    batches = [member.batch() for member in members]
    counts = torch.tensor([float(learned_tokens(batch)) for batch in batches], device=members[0].trunk.device)
    losses = torch.zeros(len(members))
    rows = [_Row(owner, example) for owner, batch in enumerate(batches) for example in batch]
    wanted = min(member.recipe.train.batch_size for member in members)
    for micro in _micros(rows, num_rows=wanted):
        micro.sort(key=lambda row: row.owner)
        owners = torch.tensor([row.owner for row in micro], device=members[0].trunk.device)
        segments = [
            (member.name, num_rows)
            for index, member in enumerate(members)
            if (num_rows := sum(row.owner == index for row in micro))
        ]
        tensors = collate([row.example for row in micro], members[0].trunk.device)
        with members[0].own_randomness(), grouped_layers(model, segments):
            before, targets, row_of = learned_positions(model, tensors)
        owner_of = owners[row_of]
        parts = position_losses(model, before, targets) / counts[owner_of]
        parts.sum().backward()  # type: ignore[no-untyped-call]
        losses.index_add_(0, owner_of.cpu(), parts.detach().float().cpu())
    failed = []
    for member, batch, loss in zip(members, batches, losses.tolist(), strict=True):
        try:
            member.finish_step(loss, batch, start=start)
        except Diverged as error:
            failed.append((member, error))
    return failed


def _micros(rows: Sequence[_Row], *, num_rows: int) -> Iterator[list[_Row]]:
    """Cut the rows of all members by length, as a member alone would; more rows share a pass, none is longer."""
    micro: list[_Row] = []
    for row in sorted(rows, key=lambda row: len(row.example.ids)):
        if len(micro) >= num_rows and (len(micro) + 1) * len(row.example.ids) > 2 * MICRO_BATCH_TOKENS:
            yield micro
            micro = []
        micro.append(row)
    yield micro


@contextmanager
def grouped_layers(model: Any, segments: Sequence[tuple[str, int]]) -> Iterator[None]:
    """Replace the forward of every LoRA layer by the grouped one, for one forward pass."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        object.__setattr__(layer, "forward", _Grouped(layer, segments))
    try:
        yield
    finally:
        for layer in layers:
            object.__delattr__(layer, "forward")


class _Grouped:
    """The forward pass of one LoRA layer for rows of several owners, the owners in order."""

    def __init__(self, layer: Any, segments: Sequence[tuple[str, int]]) -> None:
        self._layer, self._segments = layer, segments

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        layer = self._layer
        base: torch.Tensor = layer.base_layer(x)
        lengths = [num_rows for _, num_rows in self._segments]
        parts = []
        for (name, _), rows, result in zip(
            self._segments, torch.split(x, lengths), torch.split(base, lengths), strict=True
        ):
            if name in layer.lora_A:
                down = layer.lora_A[name]
                inner = down(layer.lora_dropout[name](rows.to(down.weight.dtype)))
                parts.append(result + (layer.lora_B[name](inner) * layer.scaling[name]).to(result.dtype))
            else:
                parts.append(result)
        return torch.cat(parts)
