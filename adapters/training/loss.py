"""The loss of padded rows: the head is applied at learned positions only, in chunks. Knows no optimizer."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from loractl.adapters.training.batches import Tensors, collate
from loractl.adapters.training.examples import Example

# Logits of more positions than this are computed again in the backward pass instead of being kept.
CHUNK_POSITIONS = 512


def summed_loss(model: Any, batch: Sequence[Example]) -> torch.Tensor:
    """Return the cross entropy summed over the learned tokens of all rows."""
    tensors = collate(batch, next(model.parameters()).device)
    before, targets, _ = learned_positions(model, tensors)
    return summed_cross_entropy(model, before, targets)


def learned_positions(model: Any, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states that predict a learned token [learned, hidden], the tokens, and the rows they are in."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal_lm.base_model(
        input_ids=tensors.ids, attention_mask=tensors.attended, use_cache=False
    ).last_hidden_state
    rows = torch.nonzero(tensors.learned[:, 1:])[:, 0]
    return hidden[:, :-1][tensors.learned[:, 1:]], tensors.ids[tensors.learned], rows


def summed_cross_entropy(model: Any, before: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Apply the head to `before` [learned, hidden] and sum the cross entropy."""
    return position_losses(model, before, targets).sum()


def position_losses(model: Any, before: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy at each learned position; long inputs go through the head in chunks."""
    head = (model.get_base_model() if hasattr(model, "get_base_model") else model).get_output_embeddings()

    def part(hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(hidden).float(), wanted, reduction="none")

    if len(targets) <= CHUNK_POSITIONS or not torch.is_grad_enabled():
        return part(before, targets)
    pieces = zip(torch.split(before, CHUNK_POSITIONS), torch.split(targets, CHUNK_POSITIONS), strict=True)
    losses: list[torch.Tensor] = [checkpoint(part, hidden, wanted, use_reentrant=False) for hidden, wanted in pieces]
    return torch.cat(losses)
