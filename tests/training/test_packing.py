"""Rows that lie one behind the other give the loss and gradients that transformers gives for each row alone."""

import random
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
)

from loractl.adapters.training.batches import pack, pass_shape
from loractl.adapters.training.examples import Example
from loractl.adapters.training.loss import can_pack, summed_loss
from tiny_models import tiny_llama_config

_LENGTHS = (5, 9, 3, 40, 2, 220, 7, 100, 30, 64)


def _rows(lengths: tuple[int, ...], *, seed: int = 0) -> list[Example]:
    draw = random.Random(seed)
    return [
        Example(tuple(draw.randrange(384) for _ in range(length)), tuple(draw.random() < 0.4 for _ in range(length)))
        for length in lengths
    ]


def _model(kind: str) -> Any:
    torch.manual_seed(0)
    shape = tiny_llama_config()
    if kind == "full":
        return LlamaForCausalLM(shape)
    # A window shorter than the rows: it must not reach into the row before, nor be counted from the pack's beginning.
    settings = {key: getattr(shape, key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    return MistralForCausalLM(
        MistralConfig(**settings, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=6)
    )


@pytest.mark.parametrize(("kind", "attention"), [("full", "sdpa"), ("window", "eager")])
def test_packed_rows_have_the_loss_and_gradients_of_rows_alone(kind: str, attention: str) -> None:
    model = _model(kind)
    rows = _rows(_LENGTHS)
    weight = model.model.layers[0].self_attn.q_proj.weight
    expected = 0.0
    for row in rows:
        ids = torch.tensor([row.ids])
        labels = torch.where(torch.tensor([row.learned]), ids, -100)
        count = int((labels[:, 1:] != -100).sum())
        if count:
            loss = model(input_ids=ids, labels=labels).loss * count
            loss.backward()
            expected += loss.item()
    gradient, weight.grad = weight.grad, None
    model.set_attn_implementation(attention)
    loss = summed_loss(model, rows)
    loss.backward()  # type: ignore[no-untyped-call]
    assert can_pack(model)
    assert len(pack(rows)) < len(rows)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-4)


def test_packs_hold_every_row_once_and_spare_padding() -> None:
    rows = _rows(_LENGTHS)
    packs = pack(rows)
    assert sorted(len(row.ids) for rows in packs for row in rows) == sorted(_LENGTHS)
    ordered = sorted(rows, key=lambda row: len(row.ids))
    packed, padded = (pass_shape(ordered, packed=flag) for flag in (True, False))
    assert padded == (10, 220)
    assert sum(_LENGTHS) <= packed[0] * packed[1] < 1.2 * sum(_LENGTHS)
    equal = _rows((200,) * 4)
    assert pack(equal) == [[row] for row in equal]


def test_models_that_would_mix_packed_rows_get_padded_ones() -> None:
    for config in (MambaConfig(num_hidden_layers=1, hidden_size=16), BloomConfig(n_layer=1, hidden_size=16, n_head=2)):
        with torch.device("meta"):
            assert not can_pack(AutoModelForCausalLM.from_config(config))
