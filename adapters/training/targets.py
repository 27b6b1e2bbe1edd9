"""Which linear layers of a base an adapter reaches, and what to say when a name is not there."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from loractl.adapters.errors import TargetsMissing

ALL_LINEAR = "all-linear"
# One fused layer that holds what newcomers look for under three names.
_FUSED = ("W_pack", "qkv_proj", "query_key_value", "c_attn")


def resolve_targets(model: Any, targets: Sequence[str]) -> list[str]:
    """Turn names or `all-linear` into leaf names that the base has; raises TargetsMissing listing those there are."""
    counts = linear_names(model)
    if list(targets) == [ALL_LINEAR]:
        return sorted(counts)
    missing = [name for name in targets if name not in counts]
    if missing or not targets:
        listed = ", ".join(f"{name} x{count}" for name, count in sorted(counts.items()))
        fused = next((name for name in _FUSED if name in counts), None)
        advice = f"use --targets {fused}" if fused else f"use --targets {ALL_LINEAR}"
        raise TargetsMissing(
            f"no module named {' or '.join(missing) or '(none given)'} in this base", hint=f"it has {listed}; {advice}"
        )
    return list(targets)


def linear_names(model: Any) -> Counter[str]:
    """Count the linear layers by leaf name, the head left out."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    # A layer that already has an adapter is still the base's, under the name that it had.
    return Counter(
        name.removesuffix(".base_layer").rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head and ".lora_" not in name
    )
