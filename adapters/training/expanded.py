"""Holds an int8 base's weights expanded while it trains on a CPU, where expanding them at every call costs more.

The numbers are the int8 ones; only their storage is wider. A frozen plain linear layer also keeps no input for its
backward pass, which bitsandbytes' own 8-bit function does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def expanded_weights(model: Any, *, dtype: Any) -> Iterator[None]:
    """Replace bitsandbytes' int8 layers by plain ones of the same values, and put them back at the end."""
    import torch
    from bitsandbytes.nn import Linear8bitLt

    places: list[tuple[Any, str, Any]] = []
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear8bitLt):
                places.append((module, name, child))
    for parent, name, layer in places:
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta", dtype=dtype)
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        values = layer.weight.CB if layer.weight.CB is not None else layer.weight.data
        weight = (values.float() * (scales.float() / 127.0).unsqueeze(1)).to(dtype)
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        plain.bias = layer.bias
        setattr(parent, name, plain)
    try:
        yield
    finally:
        for parent, name, layer in places:
            setattr(parent, name, layer)
