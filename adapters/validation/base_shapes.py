"""The shapes of a base's modules, from its weight files' headers or from its config. Loads no weights."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loractl.adapters.errors import NotFound
from loractl.adapters.tensors import read_header

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class BaseShapes:
    """Weight shapes `(out, in)` by module name; `num_layers` is None where the base has no numbered layers."""

    weights: Mapping[str, tuple[int, ...]]
    num_layers: int | None = None

    def of(self, module: str) -> tuple[int, ...] | None:
        """The weight's shape of a module, named as in an adapter; None when this base does not tell."""
        if module in self.weights:
            return self.weights[module]
        # Adapters of a model inside another (a language tower) carry a longer or shorter beginning.
        parts = module.split(".")
        tails = (".".join(parts[index:]) for index in range(1, len(parts) - 1))
        return next((self.weights[tail] for tail in tails if tail in self.weights), None)

    def layer_is_missing(self, module: str) -> bool:
        """Tell whether a module's layer number is beyond the base's last layer."""
        match = _LAYER.search(module)
        return match is not None and self.num_layers is not None and int(match.group(1)) >= self.num_layers


def shapes_from_folder(folder: Path) -> BaseShapes:
    """Read every weight file's header of a base folder; raises NotFound when there is none."""
    weights: dict[str, tuple[int, ...]] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise NotFound(f"{folder}: no *.safetensors", hint="a base is a folder in transformers' format")
    for path in files:
        with path.open("rb") as stream:
            for entry in read_header(stream, where=str(path)).entries.values():
                if entry.name.endswith(".weight"):
                    weights[entry.name.removesuffix(".weight")] = entry.shape
    config = folder / "config.json"
    if config.is_file() and json.loads(config.read_text()).get("tie_word_embeddings"):
        embedding = next((shape for name, shape in weights.items() if name.endswith("embed_tokens")), None)
        if embedding is not None:
            weights.setdefault("lm_head", embedding)
    layers = [int(match.group(1)) for name in weights if (match := _LAYER.search(name))]
    return BaseShapes(weights, max(layers) + 1 if layers else None)


def shapes_from_config(config: Mapping[str, Any]) -> BaseShapes | None:
    """The shapes of a Llama-like base from its config.json; None for other kinds of model."""
    try:
        hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
        heads, layers, vocabulary = (
            int(config[key]) for key in ("num_attention_heads", "num_hidden_layers", "vocab_size")
        )
    except (KeyError, TypeError, ValueError):
        return None
    if config.get("model_type") not in {"llama", "mistral", "qwen2", "qwen3"} or not 0 < layers <= 1000:
        return None
    head = int(config.get("head_dim") or hidden // heads)
    queries, keys = heads * head, int(config.get("num_key_value_heads") or heads) * head
    of_a_layer = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    weights: dict[str, tuple[int, ...]] = {
        f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in of_a_layer.items()
    }
    weights["model.embed_tokens"] = weights["lm_head"] = (vocabulary, hidden)
    return BaseShapes(weights, layers)
