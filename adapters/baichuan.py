"""Baichuan-7B in transformers' own Llama classes: its checkpoint differs only in `W_pack`, which is split on loading.

Importing this teaches transformers the model type; nothing of the repository's code is run. Saving packs it again.
"""

from collections.abc import Mapping
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter

from loractl.adapters.errors import Unsupported
from loractl.adapters.packed_layers import PACKED_LAYERS

MODEL_TYPE = "baichuan"
_VOCABULARY_2 = 125_696


class BaichuanConfig(LlamaConfig):  # type: ignore[misc]
    """Llama's settings under Baichuan's name."""

    model_type = MODEL_TYPE


class BaichuanForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """Llama's model, loaded from Baichuan's layout."""

    config_class = BaichuanConfig


def check_baichuan(config: Mapping[str, Any], *, where: str) -> None:
    """Raise Unsupported for relatives whose arithmetic is not Llama's; `config` is config.json."""
    if "max_position_embeddings" not in config:
        # The 13B models have no rotary positions and say only how long a sequence may be.
        raise Unsupported(f"{where}: Baichuan-13B has ALiBi positions", hint="Baichuan-7B is served")
    if config.get("vocab_size") == _VOCABULARY_2:
        raise Unsupported(f"{where}: Baichuan 2 normalizes its head", hint="Baichuan-7B is served")


AutoConfig.register(MODEL_TYPE, BaichuanConfig, exist_ok=True)
AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)
AutoTokenizer.register(BaichuanConfig, LlamaTokenizer, exist_ok=True)
register_checkpoint_conversion_mapping(
    MODEL_TYPE,
    [
        WeightConverter(
            source_patterns=f"self_attn.{packed}.weight",
            target_patterns=[f"self_attn.{name}.weight" for name in names],
            operations=[Chunk(dim=0)],
        )
        for packed, names in PACKED_LAYERS.items()
    ],
    overwrite=True,
)
