"""What all kernels ask before they start: whether they are interpreted, and how a product may round. No kernels."""

import os

import torch
import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def widens(dtype: torch.dtype) -> bool:
    """Whether operands of a product become float32 first: the interpreter multiplies bfloat16's bits as integers."""
    return INTERPRETED and dtype == torch.bfloat16


def precision(dtype: torch.dtype) -> str:
    """How float32 operands of a product may round, given what the other numbers of the step are held in."""
    return "ieee" if dtype == torch.float32 else "tf32"


def block(size: int, *, least: int = 16, most: int = 1 << 16) -> int:
    """The power of two that covers `size`, within the bounds that a product of tiles has."""
    return max(least, min(most, int(triton.next_power_of_2(size))))
