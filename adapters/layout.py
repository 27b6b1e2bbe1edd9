"""How a LoRA lies in its file: tensor names to modules, and the shapes of each module's parts.

Knows PEFT's names and the reader's entries; refuses to judge what it finds (that is `validation`).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from loractl.adapters.tensors import TensorEntry

PEFT_PREFIX = "base_model.model."

Part = Literal["a", "b", "embedding_a", "embedding_b", "magnitude", "bias", "tokens", "base", "whole"]

# suffix of a tensor's name -> what it is; the adapter's own name is not in a saved file
_SUFFIXES: dict[str, Part] = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".token_adapter.trainable_tokens_delta": "tokens",
    ".base_layer.weight": "base",
    ".base_layer.bias": "base",
}
_SUFFIX = re.compile("(" + "|".join(re.escape(suffix) for suffix in _SUFFIXES) + ")$")


@dataclass(frozen=True, slots=True)
class TensorName:
    """What a tensor's name says: the base's module (`model.layers.0.self_attn.q_proj`) and the part."""

    module: str
    part: Part


@dataclass(slots=True)
class LoraModule:
    """One module's tensors. `a`: [rank, in], `b`: [out, rank] (convolutions have two more dimensions).

    Of an embedding `a` is [rank, vocabulary] and `b` is [hidden, rank].
    """

    name: str
    a: TensorEntry | None = None
    b: TensorEntry | None = None
    is_embedding: bool = False
    magnitude: TensorEntry | None = None
    bias: TensorEntry | None = None

    @property
    def rank(self) -> int | None:
        return self.a.shape[0] if self.a is not None else None


@dataclass(frozen=True, slots=True)
class LoraLayout:
    """All modules of one file, by name, and the tensors that are no part of a LoRA."""

    modules: dict[str, LoraModule]
    whole: dict[str, TensorEntry] = field(default_factory=dict[str, TensorEntry])
    """Modules that were saved whole (`modules_to_save`, biases), by their name in the base with the parameter's."""
    base_weights: dict[str, TensorEntry] = field(default_factory=dict[str, TensorEntry])
    """Weights of the base that were saved along, such as a resized embedding."""
    tokens: dict[str, TensorEntry] = field(default_factory=dict[str, TensorEntry])
    """Rows of embeddings that were trained one by one."""
    without_prefix: tuple[str, ...] = ()
    """Names that do not begin as PEFT's do: PEFT would load none of them."""


def parse_tensor_name(name: str) -> TensorName:
    """Split a tensor's name; what is no LoRA part is "whole"."""
    stripped = name.removeprefix(PEFT_PREFIX)
    match = _SUFFIX.search(stripped)
    if match is None:
        return TensorName(stripped, "whole")
    return TensorName(stripped[: match.start()], _SUFFIXES[match.group(1)])


def lay_out(entries: Iterable[TensorEntry]) -> LoraLayout:
    """Group a file's tensors by module."""
    layout = LoraLayout(modules={})
    strange: list[str] = []
    for entry in entries:
        if not entry.name.startswith(PEFT_PREFIX):
            strange.append(entry.name)
        parsed = parse_tensor_name(entry.name)
        match parsed.part:
            case "whole":
                layout.whole[parsed.module] = entry
            case "base":
                layout.base_weights[parsed.module] = entry
            case "tokens":
                layout.tokens[parsed.module] = entry
            case part:
                module = layout.modules.setdefault(parsed.module, LoraModule(parsed.module))
                module.is_embedding |= part.startswith("embedding")
                slot = {"embedding_a": "a", "embedding_b": "b"}.get(part, part)
                setattr(module, slot, entry)
    return LoraLayout(layout.modules, layout.whole, layout.base_weights, layout.tokens, tuple(strange))
