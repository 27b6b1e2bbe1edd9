"""Runs the base on packed rows with paged K and V. Knows tensors, blocks and slots; nothing of requests or digests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loractl.adapters.errors import WillNotFit
from loractl.server.engine.base_model import BaseModel
from loractl.server.engine.kernels.attention import PagedBatch, paged_attention, write_kv
from loractl.server.engine.kernels.linear import PackedLinear, replace_linears
from loractl.server.engine.kernels.lora import LoraBatch, LoraSite, LoraSpan, LoraStep

_ATTENTION = "loractl_paged"
_STATE = "loractl_state"


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part of a step: new tokens, tokens before them, its blocks, its slots, and which logits to keep."""

    tokens: Sequence[int]
    num_before: int
    blocks: Sequence[int]
    slots: tuple[tuple[int, float], ...]
    keep_all: bool = False
    """Logits of every row, for prompt log probabilities, instead of the last alone."""


@dataclass(slots=True)
class PagedState:
    """What the attention modules of one model read: the step's plan, and every layer's caches."""

    k: Tensor  # [layers, blocks, block_size, kv_heads, dim]
    v: Tensor
    batch: PagedBatch | None = None


class ModelRunner:
    """One model, its paged caches and its adapter slots.

    Takes the model over: linear layers are replaced in place once, a second runner on the same model reuses them.
    """

    def __init__(self, base: BaseModel, *, num_blocks: int, block_size: int, num_slots: int, max_rank: int) -> None:
        self.model: Any = base.model
        self.block_size = block_size
        self.max_rank = max_rank
        self.dtype: torch.dtype = self.model.dtype
        self.layers = _packed_layers(self.model, int8_head=base.quantization == "int8", dtype=self.dtype)
        self._step = next(iter(self.layers.values())).step
        shape = (base_kv_layers(self.model), num_blocks, block_size, *kv_shape(self.model))
        self._state = PagedState(k=torch.empty(shape, dtype=self.dtype), v=torch.empty(shape, dtype=self.dtype))
        _attach(self.model, self._state)
        self.sites = self._carve(num_slots)

    def run(self, rows: Sequence[Row]) -> Tensor:
        """One forward pass; returns logits [kept rows, vocab] in float32, in the order of the rows."""
        tokens: list[int] = []
        kept: list[int] = []
        spans: list[LoraSpan] = []
        for row in rows:
            start = len(tokens)
            tokens.extend(row.tokens)
            kept.extend(range(start, len(tokens)) if row.keep_all else [len(tokens) - 1])
            spans.append(LoraSpan(start, len(tokens), row.slots))
        plan = [(len(row.tokens), row.num_before + len(row.tokens), row.blocks) for row in rows]
        self._state.batch = PagedBatch.build(plan, block_size=self.block_size)
        self._step.batch = LoraBatch.build(spans, num_rows=len(tokens))
        try:
            with torch.inference_mode():
                out = self.model(
                    input_ids=torch.tensor([tokens]),
                    position_ids=self._state.batch.positions[None],
                    use_cache=False,
                    logits_to_keep=torch.tensor(kept),
                )
        finally:
            self._state.batch = None
            self._step.batch = None
        logits: Tensor = out.logits[0]
        return logits.float()

    def _carve(self, num_slots: int) -> Mapping[str, LoraSite]:
        """Give every layer but the head its part of the slots; the head sees fewer rows than a step has."""
        head = self.model.get_output_embeddings()
        shapes = {
            name: (layer.in_features, layer.out_features) for name, layer in self.layers.items() if layer is not head
        }
        sizes = {
            name: LoraSite.numel(d_in=d_in, d_out=d_out, rank_max=self.max_rank, with_gain=False)
            for name, (d_in, d_out) in shapes.items()
        }
        # Zeros come from the system page by page when they are first written: ranks below the highest cost nothing.
        slab = torch.zeros(num_slots, sum(sizes.values()), dtype=self.dtype)
        sites: dict[str, LoraSite] = {}
        offset = 0
        for name, (d_in, d_out) in shapes.items():
            site = LoraSite.carve(slab, offset, d_in=d_in, d_out=d_out, rank_max=self.max_rank)
            self.layers[name].site = sites[name] = site
            offset += sizes[name]
        return sites


def kv_bytes_per_token(model: Any) -> int:
    """Bytes that one position takes in the caches of all layers."""
    heads, dim = kv_shape(model)
    return 2 * base_kv_layers(model) * heads * dim * int(model.dtype.itemsize)


def base_kv_layers(model: Any) -> int:
    return int(model.config.get_text_config().num_hidden_layers)


def kv_shape(model: Any) -> tuple[int, int]:
    """(kv heads, numbers per head)."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(heads), int(dim)


def _packed_layers(model: nn.Module, *, int8_head: bool, dtype: torch.dtype) -> dict[str, PackedLinear]:
    there = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    return there or replace_linears(model, step=LoraStep(), int8_head=int8_head, dtype=dtype)


def _attach(model: Any, state: PagedState) -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attend)
    modules = [module for module in model.modules() if hasattr(module, "layer_idx")]
    if not modules:
        raise WillNotFit(f"{type(model).__name__} has no attention layers that can be paged")
    for module in modules:
        setattr(module, _STATE, state)
    model.config.get_text_config()._attn_implementation = _ATTENTION
    model.config._attn_implementation = _ATTENTION


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query, key, value [1, heads, rows, dim]; returns [1, rows, heads, dim]."""
    del attention_mask
    state: PagedState = getattr(module, _STATE)
    assert state.batch is not None
    k_cache, v_cache = state.k[module.layer_idx], state.v[module.layer_idx]
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    write_kv(k, v, k_cache, v_cache, state.batch)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = paged_attention(
        q, k_cache, v_cache, state.batch, scale=scale, window=sliding_window, softcap=softcap, sinks=s_aux
    )
    return out[None], None
