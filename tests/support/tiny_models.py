"""Tiny real models for tests: random weights in the shapes that transformers defines, saved as ordinary folders."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loractl.adapters.base_loading import teach_layout
from tiny_tokenizer import tiny_tokenizer


def tiny_llama_config(**changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,  # large enough that greedy outputs differ between prompts
    }
    return LlamaConfig(**(settings | changes))


def make_tiny_base(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Save a random two-layer Llama in float32 with its tokenizer; `changes` go into the config."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_llama_config(**changes))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def make_baichuan_base(folder: Path, llama: Path) -> Path:
    """Save a tiny Llama's weights (as many key-value heads as heads) as Baichuan-7B's files hold them."""
    shutil.copytree(llama, folder)
    weights = load_file(llama / "model.safetensors")
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if "q_proj" in name:
            parts = [weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            packed[name.replace("q_proj", "W_pack")] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            packed[name] = tensor
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    for key in ("num_key_value_heads", "head_dim", "rope_parameters", "attention_bias", "mlp_bias"):
        config.pop(key, None)
    config |= {
        "model_type": "baichuan",
        "architectures": ["BaiChuanForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaiChuanForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_adapter(base: Path, folder: Path, *, seed: int = 0, std: float = 0.2, **settings: Any) -> Path:
    """Save a random PEFT adapter with non-zero B; `settings` go into LoraConfig."""
    teach_layout(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **(defaults | settings)))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.4))
            elif "lora_" in name:
                parameter.normal_(std=std)
    wrapped.save_pretrained(str(folder))
    # PEFT writes the path it loaded from; adapters name their base, never a path.
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base.name
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    return folder
