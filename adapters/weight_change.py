"""How large the change is that a LoRA makes to a weight, without ever building that change. numpy only."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loractl.adapters.config import LoraSpec
from loractl.adapters.layout import LoraModule, lay_out
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
    norm = norm_of_product(a, b, scaling=scaling)
    for entry in (module.a, module.b):
        if entry is not None:
            tensors.release(entry.name)
    return norm


def norm_of_product(a: Matrix, b: Matrix, *, scaling: float) -> float:
    """|scaling * B A| with `a`: [rank, in], `b`: [out, rank]: |BA|^2 = sum((B^T B) * (A A^T))."""
    with np.errstate(over="ignore", invalid="ignore"):
        squared = float(np.sum((b.T @ b).astype(np.float64) * (a @ a.T).astype(np.float64)))
    return abs(scaling) * math.sqrt(max(squared, 0.0)) if math.isfinite(squared) else math.inf


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """An adapter's file and what its configuration says of it."""

    tensors: TensorFile
    spec: LoraSpec


@dataclass(frozen=True, slots=True)
class LayerChange:
    """What two adapters do to one weight: the norm of each one's change and of the difference of both."""

    module: str
    first: float | None
    """None where that adapter leaves the weight alone."""
    second: float | None
    difference: float | None
    """None where the two cannot be compared: other shapes, or more than a product (DoRA, a bias)."""


def compare_changes(first: AdapterWeights, second: AdapterWeights) -> list[LayerChange]:
    """Compare two adapters module by module, by name; a few factors are in memory at a time."""
    left = lay_out(first.tensors.entries.values()).modules
    right = lay_out(second.tensors.entries.values()).modules
    return [
        _compare(name, (first, left.get(name)), (second, right.get(name)))
        for name in sorted(left.keys() | right.keys())
    ]


_Side = tuple[AdapterWeights, LoraModule | None]


def _compare(name: str, first: _Side, second: _Side) -> LayerChange:
    sides = [_scaled(name, *first), _scaled(name, *second)]
    norms = [None if side is None else _exact_norm(*side) for side in sides]
    is_product = all(module is None or _is_product(module) for _, module in (first, second))
    difference: float | None = None
    left, right = sides
    if is_product and left is not None and right is not None:
        if left[0].shape[1] == right[0].shape[1] and left[1].shape[0] == right[1].shape[0]:
            # [B2, -B1] [A2; A1] is the difference as one product of the summed rank.
            difference = _exact_norm(np.concatenate([right[0], left[0]]), np.concatenate([right[1], -left[1]], axis=1))
    elif is_product:
        # The other leaves this weight alone.
        difference = norms[0] if norms[0] is not None else norms[1]
    return LayerChange(name, norms[0], norms[1], difference)


def _is_product(module: LoraModule) -> bool:
    return module.magnitude is None and module.bias is None


def _scaled(name: str, side: AdapterWeights, module: LoraModule | None) -> tuple[Matrix, Matrix] | None:
    """`a`, and `b` times the module's scaling."""
    if module is None or module.a is None or module.b is None:
        return None
    a, b = factors(side.tensors, module)
    return a, b * np.float32(side.spec.scaling_of(name))


def _exact_norm(a: Matrix, b: Matrix) -> float | None:
    """|B A| by two QR factorisations in float64: near zero too it is right to many digits, which Gram products lose."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    r_b = np.asarray(np.linalg.qr(b.astype(np.float64), mode="r"))
    r_a = np.asarray(np.linalg.qr(a.T.astype(np.float64), mode="r"))
    return float(np.linalg.norm(r_b @ r_a.T))
