"""Baichuan-7B's layout is Llama's with one fused layer: it loads into the same numbers, quantized or not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loractl.adapters.base_loading import load_base_model, load_tokenizer
from loractl.adapters.errors import Incompatible, Unsupported
from loractl.adapters.manifest import Quantization
from loractl.adapters.packed_layers import RowShare, is_packed, row_shares
from tiny_models import make_baichuan_base, make_tiny_base


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "llama"
    return make_tiny_base(folder, num_key_value_heads=4, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def baichuan(llama: Path) -> Path:
    return make_baichuan_base(llama.parent / "baichuan", llama)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_baichuan_computes_as_llama_when_w_pack_is_split(
    llama: Path, baichuan: Path, quantization: Quantization
) -> None:
    ids = torch.arange(3, 20)[None]
    ours = load_base_model(baichuan, quantization=quantization, dtype="float32")
    theirs = load_base_model(llama, quantization=quantization, dtype="float32")
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_saving_packs_again_when_a_split_base_is_saved(baichuan: Path, tmp_path: Path) -> None:
    load_base_model(baichuan, quantization="none", dtype="float32").save_pretrained(tmp_path)
    saved, before = (load_file(folder / "model.safetensors") for folder in (tmp_path, baichuan))
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], before[name]) for name in saved)


def test_tokenizer_loads_without_the_repositorys_code(baichuan: Path, llama: Path) -> None:
    assert load_tokenizer(baichuan)("a film").input_ids == load_tokenizer(llama)("a film").input_ids


@pytest.mark.parametrize(
    ("change", "named"), [({"max_position_embeddings": None}, "ALiBi"), ({"vocab_size": 125_696}, "Baichuan 2")]
)
def test_relatives_with_other_arithmetic_are_refused_by_name(
    baichuan: Path, tmp_path: Path, change: dict[str, int | None], named: str
) -> None:
    config = json.loads((baichuan / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(Unsupported, match=named):
        load_base_model(tmp_path, quantization="none")


def test_rows_of_a_packed_layer_divide_equally() -> None:
    assert is_packed("model.layers.0.self_attn.W_pack")
    assert not is_packed("model.layers.0.self_attn.q_proj")
    assert row_shares("m.W_pack", 6) == (
        RowShare("m.q_proj", 0, 2),
        RowShare("m.k_proj", 2, 4),
        RowShare("m.v_proj", 4, 6),
    )
    with pytest.raises(Incompatible, match="7 outputs"):
        row_shares("m.W_pack", 7)
