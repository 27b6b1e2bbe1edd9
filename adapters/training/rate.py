"""Learning rates: over the steps of a run, and a first guess from the width of a base. Knows no optimizer."""

import math

from loractl.adapters.training.recipe import TrainPart

# 5e-5 x 10 (LoRA bears ten times the rate of full fine-tuning) x (2000 / width) ^ exponent, as thinkingmachines'
# cookbook fits it; Llama's exponent also stands for families it does not name.
_EXPONENTS = {"qwen": 0.0775}
_LLAMA_EXPONENT = 0.781


def auto_rate(hidden_size: int, *, model_type: str) -> float:
    """Return a learning rate for LoRA on a base of this width, to three digits."""
    exponent = next((value for name, value in _EXPONENTS.items() if model_type.startswith(name)), _LLAMA_EXPONENT)
    return float(f"{5e-5 * 10 * (2000 / hidden_size) ** exponent:.3g}")


def rate_at(step: int, *, num_steps: int, train: TrainPart) -> float:
    """Return the share of the full rate at a step, counted from 0."""
    rising = max(1, round(num_steps * train.warmup))
    if step < rising:
        return (step + 1) / rising
    gone = (step - rising) / max(1, num_steps - rising)
    if train.schedule == "constant":
        return 1.0
    return 1.0 - gone if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * gone))
