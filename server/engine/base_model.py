"""The base model as the engine holds it: weights, tokenizer, limits, identity. Knows no adapters and no requests."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loractl.adapters.base_identity import BaseIdentity, identify_base
from loractl.adapters.base_loading import Dtype
from loractl.adapters.manifest import Quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """A loaded base. `model` and `tokenizer` are transformers' own objects."""

    model: Any
    tokenizer: Any
    identity: BaseIdentity
    quantization: Quantization
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    memory_bytes: Mapping[str, int]
    """Bytes of parameters and buffers by kind, such as `int8`, `bfloat16`, `float32`."""


def load_base(
    folder: Path, *, quantization: Quantization, dtype: Dtype = "auto", base_id: str | None = None
) -> BaseModel:
    """Load a base from a folder in transformers' format; raises NotFound or Unsupported when it cannot be served."""
    from loractl.adapters.base_loading import load_base_model, load_tokenizer
    from loractl.server.engine.kernels import native

    identity = identify_base(folder, base_id=base_id)
    model = load_base_model(folder, quantization=quantization, dtype=dtype)
    tokenizer = load_tokenizer(folder)
    native.end_team()  # the engine computes on a thread of its own
    config = model.config.get_text_config()
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        identity=identity,
        quantization=quantization,
        max_model_len=int(getattr(config, "max_position_embeddings", None) or 4096),
        vocab_size=int(model.get_output_embeddings().weight.shape[0]),
        eos_token_ids=_eos_token_ids(model, tokenizer),
        memory_bytes=_memory_by_kind(model),
    )


def _eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    declared = [getattr(model.generation_config, "eos_token_id", None), model.config.eos_token_id]
    found = {tokenizer.eos_token_id}
    for ids in declared:
        found.update(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset(token_id for token_id in found if token_id is not None)


def _memory_by_kind(model: Any) -> dict[str, int]:
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.data_ptr() in seen:  # tied weights count once
            continue
        seen.add(tensor.data_ptr())
        kind = str(tensor.dtype).removeprefix("torch.")
        sizes[kind] = sizes.get(kind, 0) + tensor.numel() * tensor.element_size()
    return sizes
