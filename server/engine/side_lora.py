"""What adapters add to the input embedding and to the output head. Knows slots and rows; nothing of files and digests.

A vocabulary is a hundred times wider than a layer and few adapters touch it, so these parts lie outside the slots'
slab, each at its adapter's own rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loractl.server.engine.kernels.lora import LoraBatch, LoraStep

_HOOK = "loractl_side_hook"


@dataclass(frozen=True, slots=True)
class SidePart:
    """One adapter's part, scaled. Of the head a: [rank, hidden], b: [vocabulary, rank]; of the embedding a: [rank,
    vocabulary], b: [hidden, rank]. `gain` [outputs] is DoRA's factor minus one."""

    a: Tensor
    b: Tensor
    gain: Tensor | None = None

    @property
    def size_bytes(self) -> int:
        parts = (self.a, self.b, self.gain)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def to(self, device: torch.device) -> "SidePart":
        return SidePart(self.a.to(device), self.b.to(device), None if self.gain is None else self.gain.to(device))


@dataclass(slots=True)
class SideSite:
    """The parts that are resident, by slot."""

    is_embedding: bool
    parts: dict[int, SidePart] = field(default_factory=dict[int, SidePart])

    def set_slot(self, slot: int, part: SidePart | None) -> None:
        """Say what the adapter in `slot` does here; None: nothing."""
        self.parts.pop(slot, None)
        if part is not None:
            self.parts[slot] = part


def watch(module: nn.Module, site: SideSite, step: LoraStep) -> None:
    """Add the site's parts to what `module` returns from now on, in place of an earlier engine's."""
    earlier: Any = getattr(module, _HOOK, None)
    if earlier is not None:
        earlier.remove()
    setattr(module, _HOOK, module.register_forward_hook(_hook(site, step)))


def _hook(site: SideSite, step: LoraStep) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def add(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        batch = step.batch
        if batch is None or not any(slot in site.parts for slot, _, _ in batch.groups):
            return out
        bias: Any = getattr(module, "bias", None)
        rows = out.reshape(-1, out.shape[-1]).float()
        total = rows.clone()
        read = inputs[0].flatten() if site.is_embedding else inputs[0].reshape(-1, inputs[0].shape[-1])
        _add_parts(total, rows if bias is None else rows - bias.float(), read, site, batch)
        return total.to(out.dtype).view(out.shape)

    return add


def _add_parts(total: Tensor, base: Tensor, read: Tensor, site: SideSite, batch: LoraBatch) -> None:
    """Add to `total` [rows, outputs]; `read` is token ids [rows] or hidden states [rows, hidden]."""
    for slot, first, end in batch.groups:
        part = site.parts.get(slot)
        if part is None:
            continue
        rows, weights = batch.rows[first:end], batch.weights[first:end, None]
        hidden = part.a[:, read[rows]].T.float() if site.is_embedding else read[rows].float() @ part.a.float().T
        total.index_add_(0, rows, (hidden * weights) @ part.b.float().T)
        if part.gain is not None:
            total.index_add_(0, rows, base[rows] * part.gain.float() * weights)
