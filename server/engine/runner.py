"""Runs the model once over packed rows. Knows transformers' public seams, blocks and slots; nothing of requests.

Attention reaches the paged cache through `AttentionInterface` and an object on each attention module; linear layers
are replaced by ones that add each row's adapters.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loractl.server.engine import decode_graphs
from loractl.server.engine.adapter_reading import ServedLayers
from loractl.server.engine.base_model import BaseModel
from loractl.server.engine.decode_graphs import DecodeGraphs, DecodeRow
from loractl.server.engine.kernels import device as devices
from loractl.server.engine.kernels import native
from loractl.server.engine.kernels.attention import PagedBatch, paged_attention, write_kv
from loractl.server.engine.kernels.fused import AttentionOptions, FusedLayer, StepPlans, agrees, has_fused_shape
from loractl.server.engine.kernels.linear import PackedLinear, replace_linears
from loractl.server.engine.kernels.lora import LoraBatch, LoraSpan, LoraStep
from loractl.server.engine.model_shape import attention_modules, check_servable, kv_shape
from loractl.server.engine.side_lora import SideSite, watch

_ATTENTION = "loractl_paged"


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence's share of a step: its new tokens, its whole length after them, its blocks, its slots."""

    tokens: Sequence[int]
    length: int
    blocks: Sequence[int]
    slots: tuple[tuple[int, float], ...]
    num_logits: int
    """How many of its last rows want logits."""
    source: int | None = None
    """The row of the step before that chose its one token, which only the device knows yet."""


@dataclass(slots=True)
class _LayerCache:
    """What an attention module finds on itself: its K and V blocks, and the step that all layers share."""

    k: Tensor  # [blocks, block_size, kv_heads, dim]
    v: Tensor
    step: LoraStep
    asked: dict[str, Any] = field(default_factory=dict[str, Any])
    """What the layer's code last asked of its attention."""


class Runner:
    """The model made ready for packed rows; one forward pass a call."""

    def __init__(
        self, base: BaseModel, *, num_blocks: int, block_size: int, max_rows: int = 1, num_slots: int = 1
    ) -> None:
        self._model = base.model
        self._block_size = block_size
        self._lora, self._head_lora = LoraStep(), LoraStep()
        check_servable(base.model)
        self.dtype = next(p.dtype for p in base.model.parameters() if p.dtype.is_floating_point)
        self.device = next(base.model.parameters()).device
        self.on_card = devices.runs_on_card(self.device)
        # bitsandbytes leaves the head dense; by rows in int8 it costs a third of the time.
        is_native = self.device.type == "cpu" and not self.on_card and native.library() is not None
        self._int8_head = base.quantization == "int8" and is_native
        self.layers, self.sides = self._replace_layers()
        # On a card one block more, which rows that only fill a batch up write to.
        self._attach_caches(num_blocks + self.on_card)
        self.num_fused_layers = self._fuse_layers()
        recorder = decode_graphs.make_recorder(self.device) if self.on_card else None
        self._graphs: DecodeGraphs | None = None
        if recorder is not None:
            self._graphs = DecodeGraphs(
                self._decode,
                step=self._lora,
                recorder=recorder,
                max_rows=max_rows,
                num_slots=num_slots,
                table_width=-(-base.max_model_len // block_size),
                block_size=block_size,
                spare_block=num_blocks,
                device=self.device,
            )

    @property
    def kv_bytes(self) -> int:
        """Memory of all KV blocks, over all layers."""
        caches = [module.paged for module in attention_modules(self._model)]
        return sum(cache.k.nbytes + cache.v.nbytes for cache in caches if cache is not None)

    def close(self) -> None:
        """Let go of the caches and of the slots, unless another engine has already put its own in their place."""
        self._graphs = None
        for layer in self.layers.linear.values():
            layer.site = layer.site if layer.step is not self._lora else None
        for module in attention_modules(self._model):
            if module.paged is not None and module.paged.step is self._lora:
                module.paged = None

    @property
    def num_replays(self) -> int:
        """Steps that ran as a recorded one."""
        return 0 if self._graphs is None else self._graphs.num_replays

    @torch.inference_mode()
    def record(self) -> None:
        """Record the steps that can be, once the slots are there."""
        if self._graphs is not None and not self._graphs.record_all():
            self._graphs = None

    @torch.inference_mode()
    def run(self, parts: Sequence[Part], chosen: Tensor | None = None) -> Tensor:
        """Compute all parts and return logits in the model's dtype [rows that want them, vocabulary], in order.

        With `chosen` [rows], the tokens of the step before on the device, each part has a source among them.
        """
        rows = self._decode_rows(parts) if self._graphs is not None else None
        if rows is not None and self._graphs is not None and self._graphs.takes(rows):
            self._head_lora.batch = None
            return self._graphs.run(rows, chosen)
        return self._run_once(parts, chosen)

    def _decode(self, ids: Tensor, positions: Tensor) -> Tensor:
        """One forward pass over rows that all want logits; the plans are set."""
        logits: Tensor = self._model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        return logits

    def _decode_rows(self, parts: Sequence[Part]) -> list[DecodeRow] | None:
        """The parts as rows of a recorded step, or None where one has more tokens or asks for what is not recorded."""
        slots = {slot for part in parts for slot, _ in part.slots}
        if any(len(part.tokens) != 1 or part.num_logits != 1 or len(part.slots) > 1 for part in parts):
            return None
        if any(site.parts.keys() & slots for site in self.sides.values()):
            return None
        mask = sum(1 << slot for slot in slots)
        if any(layer.site is not None and layer.site.gain_mask & mask for layer in self.layers.linear.values()):
            return None
        rows = []
        for part in parts:
            slot, weight = part.slots[0] if part.slots else (None, 1.0)
            rows.append(DecodeRow(part.tokens[0], part.length, part.blocks, slot, weight, part.source or 0))
        return rows

    def _run_once(self, parts: Sequence[Part], chosen: Tensor | None = None) -> Tensor:
        self._lora.quantized = None
        ids = [token for part in parts for token in part.tokens]
        batch = self._lora.paged = PagedBatch.build(
            [(len(part.tokens), part.length, part.blocks) for part in parts],
            block_size=self._block_size,
            device=self.device,
            for_card=self.on_card,
        )
        self._lora.batch = LoraBatch.build(
            _spans([(len(part.tokens), part.slots) for part in parts]),
            num_rows=len(ids),
            device=self.device,
            for_card=self.on_card,
        )
        rows = [
            row
            for (_, end, _), part in zip(batch.bounds, parts, strict=True)
            for row in range(end - part.num_logits, end)
        ]
        # The head sees only the rows that want logits.
        self._head_lora.batch = LoraBatch.build(
            _spans([(part.num_logits, part.slots) for part in parts]), num_rows=len(rows), device=self.device
        )
        given = torch.tensor([ids if chosen is None else [part.source for part in parts]], device=self.device)
        inputs = {
            "input_ids": given if chosen is None else chosen[given],
            "position_ids": batch.positions.unsqueeze(0),
            "use_cache": False,
        }
        if not rows:
            self._model.base_model(**inputs)
            return torch.empty(0, 0)
        # Through the whole model, whatever it does after its head (soft caps, scales).
        logits: Tensor = self._model(**inputs, logits_to_keep=torch.tensor(rows, device=self.device)).logits[0]
        return logits

    @torch.inference_mode()
    def run_with_hidden(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        """As `run`, with what the head read: hidden states [rows that want logits, hidden size]."""
        read: list[Tensor] = []
        head = self._model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            logits = self._run_once(parts)  # a recorded step calls no hook
        finally:
            hook.remove()
        return logits, read[0].reshape(-1, read[0].shape[-1]) if read else logits

    def _replace_layers(self) -> tuple[ServedLayers, dict[str, SideSite]]:
        model = self._model
        linear = _packed_layers(model, step=self._lora, dtype=self.dtype, int8_head=self._int8_head)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        names = {id(module): name for name, module in model.named_modules()}
        head.step = self._head_lora
        layers = ServedLayers(
            linear={name: layer for name, layer in linear.items() if layer is not head},
            head_name=names[id(head)],
            head=head,
            embedding_name=names[id(embedding)],
            embedding_weight=embedding.weight.data,
            embedding_scale=float(getattr(embedding, "embed_scale", 1.0)),
            is_tied=bool(model.config.get_text_config().tie_word_embeddings),
        )
        sides = {layers.head_name: SideSite(is_embedding=False), layers.embedding_name: SideSite(is_embedding=True)}
        watch(head, sides[layers.head_name], self._head_lora)
        watch(embedding, sides[layers.embedding_name], self._lora)
        return layers, sides

    def _attach_caches(self, num_blocks: int) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(_ATTENTION, _attend)
        self._model.set_attn_implementation(_ATTENTION)
        modules = attention_modules(self._model)
        heads, dim = kv_shape(self._model)
        for module in modules:
            shape = (num_blocks, self._block_size, heads, dim)
            k, v = (native.zeros(*shape, dtype=self.dtype, device=self.device) for _ in range(2))
            module.paged = _LayerCache(k=k, v=v, step=self._lora)

    @torch.inference_mode()
    def _fuse_layers(self) -> int:
        """Let compiled code take the place of each decoder layer that it computes alike; returns how many."""
        rotary = getattr(self._model.base_model, "rotary_emb", None)
        layers = getattr(self._model.base_model, "layers", None)
        if rotary is None or layers is None or self.device.type != "cpu" or self.on_card:
            return 0
        plans, made = StepPlans(), list[FusedLayer]()
        generator = torch.Generator().manual_seed(0)
        for layer in layers:
            layer.__dict__.pop("forward", None)  # an earlier engine's
            if not has_fused_shape(layer):
                continue
            cache: _LayerCache = layer.self_attn.paged
            rows = min(5, cache.k.shape[1])
            self._lora.paged = PagedBatch.build([(rows, rows, [0])], block_size=self._block_size)
            width = layer.input_layernorm.weight.shape[0]
            hidden = torch.randn(1, rows, width, generator=generator).to(self.dtype)
            positions = rotary(hidden, position_ids=self._lora.paged.positions.unsqueeze(0))
            type(layer).forward(layer, hidden, position_embeddings=positions, use_cache=False)
            options = AttentionOptions(k=cache.k, v=cache.v, **cache.asked)
            fused = FusedLayer(layer, options, lora=self._lora, plans=plans)
            if agrees(layer, fused, position_embeddings=positions, hidden=hidden):
                layer.forward = fused
                made.append(fused)
            cache.k[0], cache.v[0] = 0, 0
        self._lora.paged = None
        for fused, following in itertools.pairwise(made):
            fused.precede(following)
        return len(made)


def _packed_layers(model: Any, *, step: LoraStep, dtype: torch.dtype, int8_head: bool) -> dict[str, PackedLinear]:
    """The model's linear layers, replaced once: an engine built again on the same base takes them over."""
    there = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    for layer in there.values():
        layer.step = step
    return there or replace_linears(model, step=step, dtype=dtype, int8_head=int8_head)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [1, heads, rows, dim] to [1, rows, heads, dim]."""
    del attention_mask
    cache: _LayerCache = module.paged
    batch = cache.step.paged
    if batch is None:
        raise RuntimeError("the model was called outside a step")
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    write_kv(k, v, cache.k, cache.v, batch)
    cache.asked = {
        "scale": kwargs.get("scaling") or q.shape[-1] ** -0.5,
        "window": kwargs.get("sliding_window"),
        "softcap": kwargs.get("softcap"),
        "sinks": kwargs.get("s_aux"),
    }
    out = paged_attention(
        q,
        cache.k,
        cache.v,
        batch,
        **cache.asked,
    )
    return out.unsqueeze(0), None


def _spans(counts: Sequence[tuple[int, tuple[tuple[int, float], ...]]]) -> list[LoraSpan]:
    spans, start = [], 0
    for num_rows, slots in counts:
        if num_rows:
            spans.append(LoraSpan(start, start + num_rows, slots))
        start += num_rows
    return spans
