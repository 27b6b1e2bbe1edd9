"""The compiled decoder layer against the model's own code over the same products, in mixed batches with adapters."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_drive import Drive, adapter_use
from loractl.server.engine.base_model import load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.kernels import native
from loractl.server.engine.kernels.scan import scan_rows
from loractl.server.engine.messages import AdapterUse, RequestId, Sampling, Submit
from loractl.server.engine.settings import EngineSettings
from tiny_families import make_family_base
from tiny_models import make_adapter

needs_native = pytest.mark.skipif(native.library() is None, reason="no compiled kernels on this machine")
SETTINGS = EngineSettings(
    num_slots=3, max_rank=8, max_batch_tokens=24, max_running=12, block_size=8, kv_bytes=1 << 22, prefix_cache=False
)
PROMPTS = ((5, 9, 40, 41), tuple(range(30, 51)), (7,))
TOLERANCE = {"float32": 0.02, "bfloat16": 0.25}
"""Of a log probability: a rounding in another place can move an activation by one of its 127 steps."""


def _logprobs(engine: Engine, uses: list[tuple[AdapterUse, ...]], tag: str) -> dict[str, list[float]]:
    """Log probabilities of each case's prompt, which do not depend on what is sampled, and of its first token."""
    drive = Drive(engine)
    cases = [(f"{i}-{j}", use, prompt) for i, use in enumerate(uses) for j, prompt in enumerate(PROMPTS)]
    sampling = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True, num_logprobs=0)
    for length in range(4):  # the same prompts cut shorter too, so that decoding-like rows of each length occur
        drive.submit(
            Submit(
                id=RequestId(f"{tag}-{name}-{length}"),
                prompt=prompt[: max(1, len(prompt) - length)],
                adapters=use,
                sampling=sampling,
            )
            for name, use, prompt in cases
        )
    drive.until_ended()
    found: dict[str, list[float]] = {}
    for name, _, _ in cases:
        for length in range(4):
            tokens = drive.outcomes[RequestId(f"{tag}-{name}-{length}")].tokens
            found[f"{name}-{length}"] = [token.logprob for token in tokens if token.logprob is not None]
    return found


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2-sliding", "qwen3", "mistral"])
def test_compiled_layer_gives_what_the_models_own_code_gives(tmp_path: Path, family: str, dtype: Any) -> None:
    folder = make_family_base(tmp_path / family, family)
    every = make_adapter(folder, tmp_path / "every", target_modules="all-linear", std=0.1, r=8, lora_alpha=4, seed=1)
    some = make_adapter(folder, tmp_path / "some", target_modules=["q_proj", "o_proj"], seed=2, r=3)
    one, two = (adapter_use(each) for each in (every, some))
    uses: list[tuple[AdapterUse, ...]] = [(), (one,), (two,), (one, two)]
    engine = Engine(load_base(folder, quantization="int8", dtype=dtype), SETTINGS)
    layers: Any = engine.base.model.base_model.layers
    assert engine._runner.num_fused_layers == len(layers)
    fused = _logprobs(engine, uses, "fused")
    for layer in layers:
        del layer.forward
    own = _logprobs(engine, uses, "own")
    assert fused.keys() == own.keys()
    for name, values in own.items():
        assert fused[name] == pytest.approx(values, abs=TOLERANCE[dtype]), f"{family} {name}"
    assert len({tuple(values) for values in own.values()}) > len(PROMPTS)
    engine.close()
    gc.collect()


@needs_native
@pytest.mark.parametrize("family", ["gemma2", "phi3", "gpt2"])
def test_layer_keeps_its_own_code_when_its_parts_are_others(tmp_path: Path, family: str) -> None:
    folder = make_family_base(tmp_path / family, family)
    engine = Engine(load_base(folder, quantization="int8", dtype="float32"), SETTINGS)
    assert engine._runner.num_fused_layers == 0
    engine.close()


@needs_native
def test_layer_keeps_its_own_code_when_it_computes_something_else(tmp_path: Path) -> None:
    base = load_base(make_family_base(tmp_path / "llama", "llama"), quantization="int8", dtype="float32")
    norm: Any = type(base.model.base_model.layers[0].input_layernorm)
    plain = norm.forward
    try:
        norm.forward = lambda self, x: plain(self, x) + self.weight * plain(self, x)  # as Gemma's, which adds one
        engine = Engine(base, SETTINGS)
        assert engine._runner.num_fused_layers == 0
        engine.close()
    finally:
        norm.forward = plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 15, 16, 384, 1001])
def test_scan_finds_the_first_largest_and_the_rows_that_are_not_finite(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(width)
    x = torch.randn(7, width).to(dtype)
    x[1, width // 2 :] = 9.0
    x[2, width - 1] = float("nan")
    x[3, 0] = float("inf")
    x[4, width // 3] = float("-inf")
    best, finite = scan_rows(x)
    assert finite == [True, True, False, False, False, True, True]
    for row in (0, 1, 5, 6):
        values = x[row].tolist()
        assert best[row] == values.index(max(values))
