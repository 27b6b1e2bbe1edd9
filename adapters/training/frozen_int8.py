"""A frozen 8-bit linear layer that keeps nothing of its input for the backward pass.

bitsandbytes' own function holds each input as a plain attribute, which neither recomputing nor offloading of
activations can free, although a frozen weight never needs it. Here the forward pass is bitsandbytes' in eval mode: the
served numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class FrozenInt8Linear(torch.nn.Module):
    """Stands in for a Linear8bitLt while an adapter trains; `layer` stays unregistered, thus in eval mode."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Frozen.apply(x, self.layer)  # type: ignore[no-any-return, no-untyped-call]


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        output: torch.Tensor = layer(x)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        codes, scales = _held(ctx.layer)
        # The scales meet the gradient: codes are exact in any dtype, and no wide copy of the weight is made.
        gradient = (gradients[0] * scales).to(gradients[0].dtype)
        return (gradient @ codes.to(gradient.dtype)).to(ctx.dtype), None


def int8_values(layer: Any, *, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers that a Linear8bitLt stands for, [out, in]."""
    codes, scales = _held(layer)
    return (codes.float() * scales.unsqueeze(1)).to(dtype)


def _held(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [out, in] int8 and what each row of them is multiplied by [out] float32."""
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    codes = layer.weight.CB if layer.weight.CB is not None else layer.weight.data
    return codes, scales.float() / 127.0


class Int8Layers:
    """All Linear8bitLt of a model, replaced for training and put back for evaluating as served."""

    def __init__(self, model: Any, *, expand: bool, dtype: torch.dtype) -> None:
        from bitsandbytes.nn import Linear8bitLt

        self._places: list[tuple[Any, str, Any, torch.nn.Module]] = []
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, Linear8bitLt):
                    stand_in = _expanded(child, dtype=dtype) if expand else FrozenInt8Linear(child.eval())
                    self._places.append((module, name, child, stand_in))
        self._train()

    def _train(self) -> None:
        for parent, name, _, stand_in in self._places:
            setattr(parent, name, stand_in)

    def _serve(self) -> None:
        for parent, name, layer, _ in self._places:
            setattr(parent, name, layer)

    @contextmanager
    def as_served(self) -> Iterator[None]:
        """Run with bitsandbytes' layers in eval mode, the arithmetic that serves."""
        self._serve()
        try:
            yield
        finally:
            self._train()


def _expanded(layer: Any, *, dtype: torch.dtype) -> torch.nn.Module:
    """Hold the same numbers wide: expanding them at every call costs more than the products on a CPU."""
    plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta", dtype=dtype)
    plain.weight = torch.nn.Parameter(int8_values(layer, dtype=dtype), requires_grad=False)
    plain.bias = layer.bias
    return plain
