"""Models of real shapes with random weights, made on the device as they are held, and adapters for them. No files of
weights are needed: what is measured does not depend on what the numbers are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from loractl.adapters.base_identity import BaseIdentity
from loractl.adapters.base_loading import memory_bytes, quiet_libraries
from loractl.adapters.manifest import Quantization
from loractl.server.engine.base_model import BaseModel
from tiny_tokenizer import tiny_tokenizer

_ABSMAX = 0.035  # of rows whose uniform codes then spread like a trained model's weights


@dataclass(frozen=True, slots=True)
class Shape:
    """Llama's arithmetic in some size; `is_packed`: adapters reach q, k and v as one layer, as Baichuan names it."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    is_packed: bool = False

    @property
    def targets(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of every linear layer that an adapter reaches, by its name inside a decoder layer."""
        wide, narrow = self.intermediate_size, self.hidden_size
        names = ("W_pack",) if self.is_packed else ("q_proj", "k_proj", "v_proj")
        attention = {f"self_attn.{name}": (narrow, narrow * 3 // len(names)) for name in names}
        mlp = {"mlp.gate_proj": (narrow, wide), "mlp.up_proj": (narrow, wide), "mlp.down_proj": (wide, narrow)}
        return attention | {"self_attn.o_proj": (narrow, narrow)} | mlp


LLAMA_7B = Shape("Llama-7B", 32_000, 4096, 11_008, 32, 32)
BAICHUAN_7B = Shape("Baichuan-7B", 64_000, 4096, 11_008, 32, 32, is_packed=True)
TINY = Shape("tiny", 384, 64, 96, 2, 4)
TINY_PACKED = Shape("tiny packed", 384, 64, 96, 2, 4, is_packed=True)


@torch.no_grad()
def make_model(shape: Shape, *, device: torch.device, dtype: torch.dtype, quantization: Quantization) -> Any:
    """Make a model in eval mode; with `int8` its layers are bitsandbytes', filled with codes."""
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=0,
        bos_token_id=1,
        dtype=dtype,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.to(dtype)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and quantization == "int8" and module is not model.lm_head:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _int8_layer(module, device))
            continue
        for key, parameter in list(module.named_parameters(recurse=False)):
            made = torch.empty(parameter.shape, dtype=dtype, device=device)
            filled = made.fill_(1.0) if parameter.ndim == 1 else made.normal_(std=0.02)
            setattr(module, key, torch.nn.Parameter(filled, requires_grad=False))
    return model.eval()


def _int8_layer(linear: torch.nn.Linear, device: torch.device) -> Any:
    quiet_libraries()
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    d_in, d_out = linear.in_features, linear.out_features
    codes = torch.randint(-127, 128, (d_out, d_in), dtype=torch.int8, device=device)
    absmax = torch.full((d_out,), _ABSMAX, dtype=torch.float32, device=device)
    layer: Any = Linear8bitLt(d_in, d_out, bias=False, has_fp16_weights=False, threshold=0.0, device="meta")
    hold: Any = Int8Params
    layer.weight = hold(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=absmax)
    return layer


def as_base(model: Any, *, quantization: Quantization) -> BaseModel:
    """What an engine takes."""
    identity = BaseIdentity("random", "sha256:" + "0" * 64, "", None, None)
    return BaseModel(
        model=model,
        tokenizer=tiny_tokenizer(),
        identity=identity,
        quantization=quantization,
        max_model_len=int(model.config.max_position_embeddings),
        vocab_size=int(model.config.vocab_size),
        eos_token_ids=frozenset(),
        memory_bytes={str(kind): size for kind, size in memory_bytes(model).items()},
    )


def write_adapter(folder: Path, shape: Shape, *, rank: int, seed: int, leaves: tuple[str, ...] = ()) -> Path:
    """Write a random adapter in bfloat16 on all linear layers, or on those whose names end in `leaves`."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(1 << 20, generator=generator).mul_(0.02).bfloat16()
    tensors: dict[str, torch.Tensor] = {}
    chosen = {name: size for name, size in shape.targets.items() if not leaves or name.endswith(leaves)}
    for layer in range(shape.num_layers):
        for name, (d_in, d_out) in chosen.items():
            for part, size in {"lora_A": (rank, d_in), "lora_B": (d_out, rank)}.items():
                count = size[0] * size[1]
                values = pool.repeat(-(-count // len(pool)))[:count].roll(len(tensors)).view(size)
                tensors[f"base_model.model.model.layers.{layer}.{name}.{part}.weight"] = values.contiguous()
    targets = sorted(name.rpartition(".")[2] for name in chosen)
    LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
