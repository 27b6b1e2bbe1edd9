"""Bases in every format answer as PEFT over transformers' and bitsandbytes' own modules; differences are printed."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from demo_assets import demo_base
from engine_drive import Drive, adapter_use
from loractl.server.engine.base_model import load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.messages import RequestId, Sampling, Submit
from loractl.server.engine.settings import EngineSettings
from tiny_models import make_adapter, make_tiny_base

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")]

SETTINGS = EngineSettings(num_slots=2, max_rank=8, max_running=8, kv_bytes=1 << 26)
TEXT = (
    "The hub keeps every version of an adapter, and the server answers each request with the one that it names. "
    "Water boils at one hundred degrees Celsius at sea level, and the capital of France is Paris."
)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of log probabilities of given tokens, engine less PEFT; and how often both find the same token likeliest."""

    largest: float
    mean: float
    agreement: float
    own_mean: float | None = None
    """Of the engine less the base in full, float32; where that was asked for."""
    their_mean: float | None = None
    """Of PEFT on the quantized base less the base in full."""


def _quantized(quantization: str, dtype: torch.dtype) -> Any:
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return None


@torch.inference_mode()
def _peft(base: Path, folder: Path | None, prompt: tuple[int, ...], quantization: str, dtype: torch.dtype) -> Any:
    """Log probabilities [positions, vocabulary] that PEFT gives, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=_quantized(quantization, dtype)
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # its kernel rounds the weights to bfloat16
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder))
    return torch.log_softmax(model.eval()(input_ids=torch.tensor([prompt])).logits[0].float(), -1)


def _compare(
    base: Path, folders: list[Path], prompt: tuple[int, ...], quantization: Any, dtype: Any, *, with_full: bool = False
) -> Difference:
    """Run the bare base and every adapter over one prompt in one batch."""
    drive = Drive(Engine(load_base(base, quantization=quantization, dtype=dtype), SETTINGS))
    uses = [(), *((adapter_use(folder),) for folder in folders)]
    sampling = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True, num_prompt_logprobs=1)
    drive.submit(
        Submit(id=RequestId(f"{i}"), prompt=prompt, adapters=use, sampling=sampling) for i, use in enumerate(uses)
    )
    drive.until_ended(timeout_s=180)
    drive.engine.close()
    differences, same, own, theirs = [], [], list[float](), list[float]()
    for i, folder in enumerate([None, *folders]):
        expected = _peft(base, folder, prompt, quantization, getattr(torch, dtype))
        full = _peft(base, folder, prompt, "none", torch.float32) if with_full else None
        found = drive.outcomes[RequestId(f"{i}")].finished.prompt_logprobs or ()
        assert len(found) == len(prompt) - 1
        for position, (given, likeliest) in enumerate(found):
            peft = float(expected[position, prompt[position + 1]])
            differences.append(abs(given.logprob - peft))
            same.append(likeliest.token_id == int(expected[position].argmax()))
            if full is not None:
                in_full = float(full[position, prompt[position + 1]])
                own.append(abs(given.logprob - in_full))
                theirs.append(abs(peft - in_full))
    to_full = (_mean(own), _mean(theirs)) if with_full else (None, None)
    return Difference(max(differences), _mean(differences), _mean(same), *to_full)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("quantization", "tolerance"),
    [("none", 1e-4), ("nf4", 1e-4), ("int8", 0.4)],  # bitsandbytes' own int8 product rounds rows to float16
)
def test_tiny_base_of_each_format_answers_as_peft_on_it(tmp_path: Path, quantization: str, tolerance: float) -> None:
    base = make_tiny_base(tmp_path / "base", hidden_size=64)
    folders = [
        make_adapter(base, tmp_path / "linear", target_modules="all-linear", r=8, std=0.1),
        make_adapter(base, tmp_path / "attention", r=5, seed=1),
    ]
    found = _compare(base, folders, tuple(range(20, 84)), quantization, "float32")
    print(f"\nformats tiny {quantization} float32 {found}")
    assert found.largest <= tolerance


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("quantization", "mean", "largest", "agreement"),
    # Both sides round rows to int8, each a little differently, and a step of that grid is large on a base this small.
    [("none", 0.1, 0.5, 0.95), ("int8", 0.4, 2.5, 0.8)],
)
def test_real_base_answers_as_peft_on_it(
    tmp_path: Path, quantization: str, mean: float, largest: float, agreement: float
) -> None:
    base = demo_base()
    folders = [make_adapter(base, tmp_path / "linear", target_modules="all-linear", r=8, std=0.01)]
    prompt = tuple(AutoTokenizer.from_pretrained(base).encode(TEXT))
    found = _compare(base, folders, prompt, quantization, "bfloat16", with_full=quantization == "int8")
    print(f"\nformats SmolLM2-135M {quantization} bfloat16 {found}")
    assert found.mean <= mean
    assert found.largest <= largest
    assert found.agreement >= agreement
    if found.own_mean is not None and found.their_mean is not None:
        assert found.own_mean <= 1.25 * found.their_mean  # as near to the base in full as bitsandbytes' product is
