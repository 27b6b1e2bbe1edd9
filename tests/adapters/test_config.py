"""Which modules, which rank, which scale: always what PEFT itself would say."""

import json
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from loractl.adapters.config import read_config
from loractl.adapters.errors import CheckFailed

MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in range(12)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.experts.1.up_proj")
] + ["lm_head", "model.embed_tokens", "my_q_proj", "q_proj"]


@pytest.mark.parametrize(
    "settings",
    [
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 3, r"layers\.[23]\..*_proj": 5},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3, "v_proj": 7},
        },
        {"target_modules": r".*layers\.\d\.self_attn\.(q|v)_proj"},
        {"target_modules": ["up_proj", "layers.1.self_attn.q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["up_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": ["experts", "layers"]},
        {
            "target_modules": ["q_proj", "down_proj"],
            "exclude_modules": ["layers.0.self_attn.q_proj"],
            "modules_to_save": ["mlp"],
        },
        {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.1\..*"},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 4}},
    ],
)
def test_spec_agrees_with_peft(settings: dict[str, Any]) -> None:
    spec = read_config(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16} | settings).encode())
    oracle = LoraConfig(r=8, lora_alpha=16, **settings)
    ranks, alphas = oracle.rank_pattern or {}, oracle.alpha_pattern or {}
    for module in MODULES:
        assert spec.targets(module) == bool(check_target_module_exists(oracle, module)), module
        rank = ranks.get(get_pattern_key(list(ranks), module), oracle.r)
        alpha = alphas.get(get_pattern_key(list(alphas), module), oracle.lora_alpha)
        assert spec.rank_of(module) == rank
        assert spec.scaling_of(module) == pytest.approx(alpha / (rank**0.5 if oracle.use_rslora else rank))


@pytest.mark.parametrize(
    ("change", "named"),
    [({"r": "8"}, "r"), ({"bias": "some"}, "bias"), ({"rank_pattern": {"q": 0}}, "q"), ({"use_dora": 1}, "use_dora")],
)
def test_wrong_field_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckFailed, match=named) as caught:
        read_config(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]} | change).encode())
    assert caught.value.check == "E_CFG"
