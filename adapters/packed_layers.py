"""Layers that a checkpoint holds as one and this product as several: Baichuan's `W_pack` is q_proj, k_proj and v_proj.

Knows names and row ranges only; the one place that says how they divide, for bases and for adapters alike.
"""

from dataclasses import dataclass

from loractl.adapters.errors import Incompatible

PACKED_LAYERS: dict[str, tuple[str, ...]] = {"W_pack": ("q_proj", "k_proj", "v_proj")}
"""Leaf name of a packed layer -> the layers it holds, each an equal share of its output rows, in this order."""


@dataclass(frozen=True, slots=True)
class RowShare:
    """Output rows `start` to `stop` of a packed layer are the whole of the layer `module`."""

    module: str
    start: int
    stop: int


def is_packed(module: str) -> bool:
    """Tell whether a module's name (`model.layers.0.self_attn.W_pack`) ends in a packed layer's."""
    return module.rpartition(".")[2] in PACKED_LAYERS


def row_shares(module: str, num_rows: int) -> tuple[RowShare, ...]:
    """Divide a packed layer of `num_rows` outputs; raises Incompatible when they do not divide equally.

    A LoRA on the packed layer is the same A on each share and B's rows of that share; so are a DoRA's magnitudes.
    """
    parent, dot, leaf = module.rpartition(".")
    names = PACKED_LAYERS[leaf]
    size, rest = divmod(num_rows, len(names))
    if rest:
        raise Incompatible(f"{module}: {num_rows} outputs do not divide into {', '.join(names)}")
    return tuple(RowShare(f"{parent}{dot}{name}", i * size, (i + 1) * size) for i, name in enumerate(names))
