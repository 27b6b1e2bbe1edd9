"""An 8-bit layer in training: the served numbers forward, the exact gradient back, and nothing held of its input."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from loractl.adapters.base_loading import load_base_model
from loractl.adapters.training.frozen_int8 import FrozenInt8Linear, int8_values
from tiny_models import make_tiny_base


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    base = make_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-base")
    model = load_base_model(base, quantization="int8", dtype="float32")
    return model.model.layers[0].mlp.up_proj


def test_forward_is_the_served_one_and_the_gradient_that_of_the_same_numbers(layer: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 32, requires_grad=True)
    output = FrozenInt8Linear(layer)(x)
    assert torch.equal(output, layer.eval()(x.detach()))
    weights = torch.randn_like(output)
    (output * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights @ int8_values(layer, dtype=torch.float32))


def _input_is_held(call: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Tell whether the graph of a call keeps its input's storage alive."""
    x = torch.randn(4, 32, requires_grad=True)
    inside = x * 1.0  # what a layer before would have made
    storage = inside.untyped_storage()
    output = call(inside)
    del inside
    gc.collect()
    uses = int(torch._C._storage_Use_Count(storage._cdata))
    assert output.requires_grad
    return uses > 1


def test_trap_checkpointing_leaks_in_8_bit_not_here(layer: Any) -> None:
    assert not _input_is_held(FrozenInt8Linear(layer))
    layer.train()
    try:
        assert _input_is_held(layer), "bitsandbytes has closed the leak: the stand-in may go"
    finally:
        layer.eval()
