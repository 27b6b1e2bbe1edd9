"""Chooses the next tokens of a whole step where its logits are. Knows rows and numbers, no requests.

A row's random number comes from its request's own generator on the host, so that its choice never depends on its
neighbours; the rest happens on the device, and the host waits once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row's token is drawn; `uniform` in [0, 1) decides which."""

    uniform: float
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @property
    def is_ordered(self) -> bool:
        """Whether tokens are looked at by their probability, not by their number."""
        return self.top_p < 1.0 or self.top_k > 0


@dataclass(frozen=True, slots=True)
class Picks:
    """What was chosen for each row, on its way to the host."""

    tokens: Tensor  # [rows] int64, on the device
    found: Tensor  # [2, rows] int64 on the host: tokens, and 1 where all logits are finite
    arrived: Any = None
    """The event that says that `found` is there; None: it is."""

    def read(self) -> tuple[list[int], list[bool]]:
        """Wait for each row's token, and whether its logits are all finite."""
        if self.arrived is not None:
            self.arrived.synchronize()  # the one wait of a step
        tokens, flags = self.found.tolist()
        return tokens, [bool(flag) for flag in flags]


def pick_rows(logits: Tensor, draws: Sequence[Draw | None]) -> Picks:
    """Choose each row's token from logits [rows, vocabulary], the likeliest where there is no draw; waits for
    nothing."""
    chosen = logits.argmax(dim=-1)
    # Two calls, for the order in which probabilities are cumulated must not change with a neighbour's filters.
    for is_ordered in (False, True):
        drawn = {row: draw for row, draw in enumerate(draws) if draw is not None and draw.is_ordered == is_ordered}
        if drawn:
            places = _send(torch.tensor(list(drawn)), logits.device)
            chosen[places] = draw_tokens(logits[places], list(drawn.values()))
    finite = torch.isfinite(logits).all(dim=-1)
    found = torch.stack([chosen, finite.long()])
    if found.device.type != "cuda":
        return Picks(chosen, found)
    there = torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return Picks(chosen, there, arrived)


def draw_tokens(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Return [rows] int64: each row's token at its `uniform` of the cumulated probabilities that its filters leave.

    All draws are ordered, or none.
    """
    names = ("uniform", "temperature", "top_p", "top_k", "min_p")
    numbers = torch.tensor([[getattr(draw, name) for name in names] for draw in draws], dtype=torch.float64)
    uniform, temperature, top_p, top_k, min_p = _send(numbers, logits.device).T[:, :, None]
    probabilities = torch.softmax(logits.float() / temperature.float(), dim=-1).double()
    order: Tensor | None = None
    if draws[0].is_ordered:
        # Equal numbers keep the order of their tokens, whatever the device.
        probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(probabilities.shape[1], device=logits.device)
        probabilities = probabilities.masked_fill((top_k > 0) & (rank >= top_k), 0.0)
    if any(draw.min_p for draw in draws):
        probabilities = probabilities.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), 0.0)
    if order is not None:
        before = probabilities.cumsum(-1) - probabilities
        # A token stays while those before it do not yet hold the mass: the first always stays.
        probabilities = probabilities.masked_fill(
            (top_p < 1.0) & (before >= top_p * probabilities.sum(-1, keepdim=True)), 0.0
        )
    cumulated = probabilities.cumsum(-1)
    whole = cumulated[:, -1:]
    wanted = torch.minimum(uniform * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    place = torch.searchsorted(cumulated, wanted.contiguous(), right=True).clamp(max=cumulated.shape[1] - 1)
    return (place if order is None else order.gather(-1, place))[:, 0]


def _send(numbers: Tensor, device: torch.device) -> Tensor:
    """Copy to the device behind what it has been asked for, without a wait for it, which pageable memory may cost."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)
