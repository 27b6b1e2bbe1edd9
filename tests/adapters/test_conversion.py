"""Adapters moved between W_pack and its parts: PEFT computes the same change from either."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from loractl.adapters.base_loading import load_base_model
from loractl.adapters.base_source import BaseSource
from loractl.adapters.conversion import convert_adapter
from loractl.adapters.errors import Incompatible, Unsupported
from loractl.adapters.merging import merge_into_base
from loractl.adapters.validation import FolderTree, Policy, validate_tree
from tiny_models import make_adapter, make_baichuan_base, make_tiny_base


@pytest.fixture(scope="module")
def baichuan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    llama = make_tiny_base(folder / "llama", num_key_value_heads=4, tie_word_embeddings=False)
    return make_baichuan_base(folder / "baichuan", llama)


_KINDS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "r": 5, "lora_alpha": 7},
    {"target_modules": ["k_proj", "up_proj"], "use_rslora": True},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.1.self_attn.v_proj": 2}},
]


@pytest.mark.parametrize("kind", _KINDS)
def test_packed_adapter_makes_the_change_that_the_split_one_makes(
    baichuan: Path, tmp_path: Path, kind: dict[str, Any]
) -> None:
    """The original layout plus PEFT's own change for W_pack is what merging into the split base saves."""
    adapter = make_adapter(baichuan, tmp_path / "adapter", **kind)
    merged = merge_into_base(adapter, BaseSource(baichuan, "baichuan", None), tmp_path / "merged", dtype="float32")
    packed = convert_adapter(adapter, "w_pack", tmp_path / "packed")
    wanted = load_file(merged.folder / "model.safetensors")
    found = _changed_by_peft(load_file(baichuan / "model.safetensors"), packed)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5, msg=name)
    before = load_file(baichuan / "model.safetensors")
    assert sum("W_pack" in name and not torch.equal(found[name], before[name]) for name in before) == 2


def _changed_by_peft(weights: dict[str, torch.Tensor], adapter: Path) -> dict[str, torch.Tensor]:
    """Let PEFT merge an adapter into bare linear layers that bear the checkpoint's names."""
    root = nn.Module()
    for name, tensor in weights.items():
        if (tensor.ndim == 2 and "proj" in name) or "W_pack" in name:
            parent = root
            *path, leaf, _ = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            layer = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
            layer.weight = nn.Parameter(tensor.clone(), requires_grad=False)
            parent.add_module(leaf, layer)
    config = LoraConfig.from_pretrained(str(adapter))
    model: Any = inject_adapter_in_model(config, root)
    state = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
    }
    set_peft_model_state_dict(model, state)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.merge()
    merged = {
        name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items() if "lora_" not in name
    }
    return weights | merged


@pytest.mark.parametrize("kind", [*_KINDS, {"target_modules": ["q_proj", "k_proj", "v_proj"], "use_dora": True}])
def test_splitting_again_gives_the_logits_that_were_there(baichuan: Path, tmp_path: Path, kind: dict[str, Any]) -> None:
    adapter = make_adapter(baichuan, tmp_path / "adapter", **kind)
    packed = convert_adapter(adapter, "w_pack", tmp_path / "packed")
    again = convert_adapter(packed, "split", tmp_path / "again")
    ids = torch.arange(3, 30)[None]
    logits = []
    for folder in (adapter, again):
        base = load_base_model(baichuan, quantization="none", dtype="float32")
        logits.append(PeftModel.from_pretrained(base, str(folder)).eval()(ids).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits[0], load_base_model(baichuan, quantization="none", dtype="float32")(ids).logits)


def test_converted_folder_passes_the_hubs_checks_and_names_its_parent(baichuan: Path, tmp_path: Path) -> None:
    packed = convert_adapter(make_adapter(baichuan, tmp_path / "adapter"), "w_pack", tmp_path / "packed")
    assert not validate_tree(FolderTree(packed), policy=Policy(base_pin="warn"), base=None).rejections
    config = json.loads((packed / "adapter_config.json").read_text())
    assert (config["target_modules"], config["r"], config["lora_alpha"]) == (["W_pack"], 8, 16)


def test_what_cannot_be_converted_is_refused_by_name(baichuan: Path, tmp_path: Path) -> None:
    on_mlp = make_adapter(baichuan, tmp_path / "mlp", target_modules=["up_proj"])
    for layout in ("w_pack", "split"):
        with pytest.raises(Incompatible, match="no adapter on"):
            convert_adapter(on_mlp, layout, tmp_path / "out")
    half = make_adapter(baichuan, tmp_path / "half", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(Unsupported, match="DoRA on some"):
        convert_adapter(half, "w_pack", tmp_path / "out")
    assert not (tmp_path / "out").exists()
