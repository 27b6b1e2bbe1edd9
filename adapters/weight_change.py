"""How large the change is that a LoRA makes to a weight, without ever building that change. numpy only."""

import math

import numpy as np
import numpy.typing as npt

from loractl.adapters.layout import LoraModule
from loractl.adapters.tensors import TensorFile

Matrix = npt.NDArray[np.float32]


def factors(tensors: TensorFile, module: LoraModule) -> tuple[Matrix, Matrix]:
    """`a`: [rank, in], `b`: [out, rank] in float32; a convolution's window is part of `in`."""
    assert module.a is not None
    assert module.b is not None
    a = tensors.read_float32(module.a.name)
    b = tensors.read_float32(module.b.name)
    return a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)


def change_norm(tensors: TensorFile, module: LoraModule, *, scaling: float) -> float:
    """The Frobenius norm of `scaling * B A`, from two [rank, rank] products."""
    a, b = factors(tensors, module)
    return norm_of_product(a, b, scaling=scaling)


def norm_of_product(a: Matrix, b: Matrix, *, scaling: float) -> float:
    """|scaling * B A| with `a`: [rank, in], `b`: [out, rank]: |BA|^2 = sum((B^T B) * (A A^T))."""
    with np.errstate(over="ignore", invalid="ignore"):
        squared = float(np.sum((b.T @ b).astype(np.float64) * (a @ a.T).astype(np.float64)))
    return abs(scaling) * math.sqrt(max(squared, 0.0)) if math.isfinite(squared) else math.inf
