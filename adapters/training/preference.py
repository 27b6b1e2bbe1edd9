"""Direct preference optimization: the loss of pairs against the model that a run began with. Knows no optimizer.

Rafailov et al., arXiv 2305.18290: -log sigmoid(beta x margin), the margin being how much more likely than the reference
the model makes the chosen answer, less the same for the rejected one. The reference is the adapter switched off, so no
second model is held; for an adapter that goes on from another, it is that other one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from loractl.adapters.training.batches import MICRO_BATCH_TOKENS, collate, micro_batches
from loractl.adapters.training.distributed import World
from loractl.adapters.training.examples import Example
from loractl.adapters.training.loss import learned_positions, position_losses
from loractl.adapters.training.recipe import PreferencePart
from loractl.adapters.training.trunk import Trunk

_EVAL_PAIRS = 8


@dataclass(frozen=True, slots=True)
class PairSums:
    """Sums over pairs; `loss` may be differentiable."""

    loss: torch.Tensor
    rewards: float
    """Rewards of chosen answers less those of rejected ones, a reward being beta x (log p - log p of the reference)."""
    num_right: float
    """Pairs whose chosen answer has the higher reward."""


class Reference:
    """The model that a run began with."""

    def __init__(self, trunk: Trunk, name: str, weights: Sequence[torch.Tensor], *, is_adapter: bool) -> None:
        self._trunk, self._name, self._weights = trunk, name, weights
        self._began_with = [weight.detach().clone() for weight in weights] if is_adapter else None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Compute as the reference, without gradients; no graph of the adapter may be alive."""
        with torch.no_grad():
            if self._began_with is None:
                with self._trunk.without_adapter(self._name):
                    yield
                return
            now = [weight.data for weight in self._weights]
            for weight, then in zip(self._weights, self._began_with, strict=True):
                weight.data = then
            try:
                yield
            finally:
                for weight, held in zip(self._weights, now, strict=True):
                    weight.data = held


def pair_sums(
    trunk: Trunk, pairs: Sequence[Example], reference: Reference, part: PreferencePart, *, sft_scale: float = 0.0
) -> PairSums:
    """Sum the loss over pairs that go through the model together.

    `sft_scale` is what the chosen answers' summed cross entropy is multiplied by before it is added.
    """
    sequences = [*pairs, *(pair.rejected for pair in pairs if pair.rejected is not None)]
    with reference.active():
        of_reference = sequence_logprobs(trunk.model, sequences)
    logprobs = sequence_logprobs(trunk.model, sequences)
    chosen, rejected = (logprobs - of_reference).chunk(2)
    rewards = part.beta * (chosen - rejected)
    smoothing = part.label_smoothing
    losses = -(1 - smoothing) * F.logsigmoid(rewards) - smoothing * F.logsigmoid(-rewards)
    loss = losses.sum()
    if sft_scale:
        loss = loss - sft_scale * logprobs[: len(pairs)].sum()
    return PairSums(loss, float(rewards.detach().sum()), float((rewards.detach() > 0).sum()))


def sequence_logprobs(model: torch.nn.Module, sequences: Sequence[Example]) -> torch.Tensor:
    """Return the log probability of each sequence's learned tokens [sequences], float32."""
    tensors = collate(sequences, next(model.parameters()).device)
    before, targets, rows = learned_positions(model, tensors)
    losses = position_losses(model, before, targets)
    return torch.zeros(len(sequences), device=losses.device).index_add(0, rows, -losses)


def evaluate_pairs(
    trunk: Trunk, pairs: Sequence[Example], reference: Reference, part: PreferencePart, world: World
) -> tuple[float, float, float]:
    """Return mean loss, mean reward margin and the share of pairs ranked right, in the mode that the model is in."""
    sums = [0.0, 0.0, 0.0]
    with torch.inference_mode():
        for micro in micro_batches(world.share(pairs), num_rows=_EVAL_PAIRS, num_tokens=MICRO_BATCH_TOKENS):
            found = pair_sums(trunk, micro, reference, part)
            values = (float(found.loss), found.rewards, found.num_right)
            sums = [total + value for total, value in zip(sums, values, strict=True)]
    loss, rewards, num_right, count = world.sum([*sums, float(len(world.share(pairs)))])
    return loss / count, rewards / count, num_right / count
