"""Which code a tensor's device asks for. Imports nothing that a machine without a card may lack."""

import importlib.util
from functools import cache

import torch


@cache
def has_triton() -> bool:
    """Whether Triton is installed; torch's CUDA builds bring it along."""
    return importlib.util.find_spec("triton") is not None


def runs_on_card(device: torch.device) -> bool:
    """Whether a step on `device` runs the kernels in `cuda/`; without Triton torch's own products run there."""
    return device.type == "cuda" and has_triton()
