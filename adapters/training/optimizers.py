"""The optimizer of one adapter: torch's AdamW or bitsandbytes' 8-bit ones, with LoRA+ through PEFT. Knows no data."""

from collections.abc import Sequence
from typing import Any

import torch

from loractl.adapters.errors import Unsupported
from loractl.adapters.training.recipe import TrainPart


def make_optimizer(model: Any, parameters: Sequence[torch.nn.Parameter], train: TrainPart, *, rate: float) -> Any:
    """Make the optimizer over the active adapter's parameters; each group keeps its full rate as `full_rate`."""
    on_cuda = parameters[0].device.type == "cuda"
    kind: Any
    settings: dict[str, Any]
    if train.optimizer == "adamw" or (train.optimizer == "auto" and not on_cuda):
        kind, settings = torch.optim.AdamW, {"betas": (0.9, 0.999), "fused": True}
    elif not on_cuda:
        raise Unsupported(f"train.optimizer={train.optimizer} needs a CUDA device", hint="train.optimizer=adamw")
    else:
        import bitsandbytes.optim

        names = {"auto": "PagedAdamW8bit", "adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}
        kind, settings = getattr(bitsandbytes.optim, names[train.optimizer]), {}
    if train.lora_plus:
        from peft.optimizers import create_loraplus_optimizer

        optimizer: Any = create_loraplus_optimizer(
            model=model,
            optimizer_cls=kind,
            lr=rate,
            loraplus_lr_ratio=train.lora_plus,
            loraplus_weight_decay=train.weight_decay,
            **settings,
        )
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    else:
        optimizer = kind(list(parameters), lr=rate, weight_decay=train.weight_decay, **settings)
    for group in optimizer.param_groups:
        group["full_rate"] = group["lr"]
    return optimizer


def set_rate(optimizer: Any, share: float) -> float:
    """Set every group to a share of its full rate; returns the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group["full_rate"] * share
    return float(optimizer.param_groups[0]["lr"])
