"""What the engine must know of a transformers model before it runs it, and which models it refuses. Changes nothing."""

import inspect
from typing import Any

import torch

from loractl.adapters.errors import Unsupported


def check_servable(model: Any) -> None:
    """Raise Unsupported, naming what it is, for a model whose arithmetic packed rows cannot carry."""
    config = model.config.get_text_config()
    kind = config.model_type
    if config.is_encoder_decoder:
        _refuse(kind, "an encoder beside its decoder")
    if getattr(config, "alibi", False) or kind in {"bloom", "mpt"}:
        _refuse(kind, "ALiBi positions")
    if "logits_to_keep" not in inspect.signature(model.forward).parameters or not model._supports_attention_backend:
        _refuse(kind, "attention outside transformers' AttentionInterface")
    layer_types = set(getattr(config, "layer_types", None) or ())
    if strange := sorted(layer_types - {"full_attention", "sliding_attention"}):
        _refuse(kind, f"layers of the kind {', '.join(strange)}")
    if getattr(config, "num_kv_shared_layers", None):
        _refuse(kind, "layers that share keys and values")
    rope = getattr(config, "rope_parameters", None) or {}
    for one in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if one.get("rope_type") in {"dynamic", "longrope"}:
            _refuse(kind, f"{one['rope_type']} positions, which change with the longest neighbour")
    experts = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    if experts:
        _refuse(kind, f"experts held as one tensor ({experts[0]})")
    attention_modules(model)
    _check_one_shape(model)


def attention_modules(model: Any) -> list[Any]:
    """The modules that call an attention function, in the order of their layers."""
    found = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")]
    layers = model.config.get_text_config().num_hidden_layers
    if len(found) != layers or {int(module.layer_idx) for module in found} != set(range(layers)):
        _refuse(model.config.model_type, f"{len(found)} standard attention modules for {layers} layers")
    return sorted(found, key=lambda module: int(module.layer_idx))


def kv_shape(model: Any) -> tuple[int, int]:
    """(key-value heads, their dimension) of a layer."""
    config = model.config.get_text_config()
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return heads, dim


def linear_shapes(model: Any) -> list[tuple[int, int]]:
    """(inputs, outputs) of every linear layer but the head, before or after an engine has replaced them."""
    head = model.get_output_embeddings()
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if module is head or any(name.startswith(f"{done}.") for done in shapes):
            continue
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            shapes[name] = (int(module.in_features), int(module.out_features))
        elif type(module).__name__ == "Conv1D":  # GPT-2's, whose sizes have names of their own
            shapes[name] = (int(module.nx), int(module.nf))
    return list(shapes.values())


def _check_one_shape(model: Any) -> None:
    """Refuse what the head's and the embedding's names would hide: heads that are no linear layer, several tables."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None or not isinstance(embedding, torch.nn.Embedding):
        _refuse(model.config.model_type, "no plain embedding and head")


def _refuse(kind: str, what: str) -> None:
    raise Unsupported(f"this base ({kind}) has {what}", hint="the engine serves decoders with standard attention")
