"""What a run would take, from shapes alone: rows, tokens, steps and bytes. Loads no weights."""

import math
from typing import Any

from loractl.adapters.training.recipe import Recipe

_ADAPTER_BYTES_PER_PARAMETER = 16  # float32 weight, gradient and two Adam moments
_BYTES_PER_LINEAR_WEIGHT = {"int8": 1.0, "nf4": 0.5 + 0.127 / 8, "none": 2.0}


def make_plan(recipe: Recipe) -> dict[str, Any]:
    """Return the ledger of a run; raises what `train` would raise before its first step."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from loractl.adapters.base_loading import teach_layout
    from loractl.adapters.training.run import prepare
    from loractl.adapters.training.targets import linear_names, resolve_targets

    inputs = prepare(recipe)
    teach_layout(inputs.folder)
    config = AutoConfig.from_pretrained(str(inputs.folder), local_files_only=True)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    targets = set(resolve_targets(model, recipe.adapter.targets))
    names = linear_names(model)
    linear = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in names
    ]
    num_linear = sum(module.weight.numel() for _, module in linear)
    num_total = sum(parameter.numel() for parameter in model.parameters())
    num_adapter = sum(
        recipe.adapter.rank * (module.in_features + module.out_features)
        for name, module in linear
        if name.rpartition(".")[2] in targets
    )
    lengths = sorted(len(example.ids) for example in inputs.train)
    step_rows = recipe.train.batch_size * recipe.train.accumulation
    return {
        "base": f"{inputs.identity.id} {inputs.identity.fingerprint[:19]}",
        "rows": len(inputs.train),
        "rows held out": len(inputs.held_out),
        "rows too long": inputs.summary.num_overlong,
        "tokens": sum(lengths),
        "tokens learned": sum(example.num_learned for example in inputs.train),
        "longest row, tokens": lengths[-1],
        "steps": max(1, math.ceil(len(inputs.train) * recipe.train.epochs / step_rows)),
        "rows per step": step_rows,
        "trainable parameters": num_adapter,
        "base bytes": round(num_linear * _BYTES_PER_LINEAR_WEIGHT[recipe.quantize] + (num_total - num_linear) * 2),
        "adapter and optimizer bytes": num_adapter * _ADAPTER_BYTES_PER_PARAMETER,
        "full fine-tuning bytes": num_total * _ADAPTER_BYTES_PER_PARAMETER,
    }
