"""The loss of rows: the head is applied at learned positions only, in chunks. Knows no optimizer."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from loractl.adapters.training.batches import Tensors, collate, collate_packs, pack
from loractl.adapters.training.examples import Example

# Logits of more positions than this are computed again in the backward pass instead of being kept.
CHUNK_POSITIONS = 512


def summed_loss(model: Any, batch: Sequence[Example]) -> torch.Tensor:
    """Return the cross entropy summed over the learned tokens of all rows."""
    device = next(model.parameters()).device
    tensors = collate_packs(pack(batch), device) if can_pack(model) else collate(batch, device)
    before, targets, _ = learned_positions(model, tensors)
    return summed_cross_entropy(model, before, targets)


def can_pack(model: Any) -> bool:
    """Whether rows one behind the other are as apart as rows of their own: attention alone mixes tokens, by rope."""
    base = _causal_lm(model)
    config = base.config.get_text_config()
    by_position = bool(getattr(config, "rope_parameters", None)) and not getattr(config, "alibi", False)
    by_attention = set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
    return by_position and by_attention and base._supports_attention_backend and not base._is_stateful


def learned_positions(model: Any, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states that predict a learned token [learned, hidden], the tokens, and the rows they are in."""
    where = {} if tensors.positions is None else {"position_ids": tensors.positions}
    hidden = (
        _causal_lm(model)
        .base_model(input_ids=tensors.ids, attention_mask=tensors.attended, use_cache=False, **where)
        .last_hidden_state
    )
    rows = torch.nonzero(tensors.learned[:, 1:])[:, 0]
    return hidden[:, :-1][tensors.learned[:, 1:]], tensors.ids[tensors.learned], rows


def summed_cross_entropy(model: Any, before: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Apply the head to `before` [learned, hidden] and sum the cross entropy."""
    return position_losses(model, before, targets).sum()


def position_losses(model: Any, before: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy at each learned position; long inputs go through the head in chunks."""
    head = _causal_lm(model).get_output_embeddings()

    def part(hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(hidden).float(), wanted, reduction="none")

    if len(targets) <= CHUNK_POSITIONS or not torch.is_grad_enabled():
        return part(before, targets)
    pieces = zip(torch.split(before, CHUNK_POSITIONS), torch.split(targets, CHUNK_POSITIONS), strict=True)
    losses: list[torch.Tensor] = [checkpoint(part, hidden, wanted, use_reentrant=False) for hidden, wanted in pieces]
    return torch.cat(losses)


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
