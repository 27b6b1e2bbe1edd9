"""Runs the model once over packed rows. Knows transformers' public seams, blocks and slots; nothing of requests.

Attention reaches the paged cache through `AttentionInterface` and an object on each attention module; linear layers
are replaced by ones that add each row's adapters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loractl.adapters.errors import Unsupported
from loractl.server.engine.base_model import BaseModel
from loractl.server.engine.kernels.attention import PagedBatch, paged_attention, write_kv
from loractl.server.engine.kernels.linear import PackedLinear, replace_linears
from loractl.server.engine.kernels.lora import LoraBatch, LoraSpan, LoraStep

_ATTENTION = "loractl_paged"


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence's share of a step: its new tokens, its whole length after them, its blocks, its slots."""

    tokens: Sequence[int]
    length: int
    blocks: Sequence[int]
    slots: tuple[tuple[int, float], ...]
    wants_logits: bool


@dataclass(slots=True)
class _LayerCache:
    """What an attention module finds on itself: its K and V blocks, and the step that all layers share."""

    k: Tensor  # [blocks, block_size, kv_heads, dim]
    v: Tensor
    step: "_Step"


@dataclass(slots=True)
class _Step:
    batch: PagedBatch | None = None


class Runner:
    """The model made ready for packed rows; one forward pass a call."""

    def __init__(self, base: BaseModel, *, num_blocks: int, block_size: int) -> None:
        self._model = base.model
        self._block_size = block_size
        self._lora = LoraStep()
        self._step = _Step()
        self.dtype = next(p.dtype for p in base.model.parameters() if p.dtype.is_floating_point)
        self.device = next(base.model.parameters()).device
        self.layers = _packed_layers(base.model, step=self._lora, dtype=self.dtype)
        self._attach_caches(num_blocks)
        config = base.model.config.get_text_config()
        self._softcap = getattr(config, "final_logit_softcapping", None)

    @torch.inference_mode()
    def run(self, parts: Sequence[Part]) -> Tensor:
        """Compute all parts and return float32 logits [parts that want them, vocabulary], in order."""
        ids = [token for part in parts for token in part.tokens]
        self._step.batch = PagedBatch.build(
            [(len(part.tokens), part.length, part.blocks) for part in parts],
            block_size=self._block_size,
            device=self.device,
        )
        self._lora.batch = LoraBatch.build(_spans(parts), num_rows=len(ids), device=self.device)
        hidden = self._model.base_model(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=self._step.batch.positions.unsqueeze(0),
            use_cache=False,
        ).last_hidden_state[0]
        last = [end - 1 for (_, end, _), part in zip(self._step.batch.bounds, parts, strict=True) if part.wants_logits]
        # The head has no slot: adapters never reach it.
        self._lora.batch = None
        logits: Tensor = self._model.get_output_embeddings()(hidden[last]).float()
        return torch.tanh(logits / self._softcap) * self._softcap if self._softcap else logits

    def _attach_caches(self, num_blocks: int) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(_ATTENTION, _attend)
        self._model.set_attn_implementation(_ATTENTION)
        modules = attention_modules(self._model)
        heads, dim = kv_shape(self._model)
        for module in modules:
            shape = (num_blocks, self._block_size, heads, dim)
            k = torch.zeros(shape, dtype=self.dtype, device=self.device)
            module.paged = _LayerCache(k=k, v=torch.zeros_like(k), step=self._step)


def _packed_layers(model: Any, *, step: LoraStep, dtype: torch.dtype) -> dict[str, PackedLinear]:
    """The model's linear layers, replaced once: an engine built again on the same base takes them over."""
    there = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    for layer in there.values():
        layer.step = step
    return there or replace_linears(model, step=step, dtype=dtype)


def attention_modules(model: Any) -> list[Any]:
    """The modules that call an attention function, in the order of their layers."""
    found = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")]
    layers = model.config.get_text_config().num_hidden_layers
    if len(found) != layers:
        raise Unsupported(
            f"{model.config.model_type}: {len(found)} attention modules for {layers} layers",
            hint="the engine serves decoders with one standard attention a layer",
        )
    return sorted(found, key=lambda module: int(module.layer_idx))


def kv_shape(model: Any) -> tuple[int, int]:
    """(key-value heads, their dimension) of a layer."""
    config = model.config.get_text_config()
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return heads, dim


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [1, heads, rows, dim] to [1, rows, heads, dim]."""
    del attention_mask
    cache: _LayerCache = module.paged
    batch = cache.step.batch
    if batch is None:
        raise RuntimeError("the model was called outside a step")
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    write_kv(k, v, cache.k, cache.v, batch)
    scale = kwargs.get("scaling") or q.shape[-1] ** -0.5
    out = paged_attention(
        q,
        cache.k,
        cache.v,
        batch,
        scale=scale,
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    return out.unsqueeze(0), None


def _spans(parts: Sequence[Part]) -> list[LoraSpan]:
    spans, start = [], 0
    for part in parts:
        spans.append(LoraSpan(start, start + len(part.tokens), part.slots))
        start += len(part.tokens)
    return spans
