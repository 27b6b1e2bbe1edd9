"""One tiny random model of each family of decoders that the engine serves, saved as ordinary folders."""

from pathlib import Path
from typing import Any

import torch
import transformers

from tiny_models import make_baichuan_base, make_tiny_base
from tiny_tokenizer import tiny_tokenizer

_SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
_NEOX = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}
_GPT2 = {
    "vocab_size": 384,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
# family -> (config class, its settings)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", _SIZES),
    "qwen2-sliding": (
        "Qwen2Config",
        _SIZES | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", _SIZES | {"head_dim": 16}),
    "mistral": ("MistralConfig", _SIZES | {"sliding_window": 6}),
    "gemma2": (
        "Gemma2Config",
        _SIZES
        | {
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        _SIZES | {"head_dim": 16, "sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 24},
    ),
    "phi3": ("Phi3Config", _SIZES | {"sliding_window": 6}),
    "gpt2": ("GPT2Config", _GPT2),
    "gpt2-scaled": ("GPT2Config", _GPT2 | {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}),
    "gpt_neox": ("GPTNeoXConfig", _NEOX),
    "gpt_neox-serial": ("GPTNeoXConfig", _NEOX | {"use_parallel_residual": False, "tie_word_embeddings": True}),
}


def make_family_base(folder: Path, family: str, *, seed: int = 0, **changes: Any) -> Path:
    """Save a random model of a family (or `llama`, `baichuan`) in float32 with its tokenizer."""
    if family == "llama":
        return make_tiny_base(folder, seed=seed, **changes)
    if family == "baichuan":
        llama = make_tiny_base(folder.parent / "as-llama", num_key_value_heads=4, tie_word_embeddings=False)
        return make_baichuan_base(folder, llama)
    class_name, settings = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, class_name)(**(settings | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        # Norms start as ones and biases as zeros: random ones show a bias or a norm that is left out.
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * (0.1 if name.endswith("weight") else 0.3))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
