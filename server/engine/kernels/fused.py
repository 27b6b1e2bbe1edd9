"""A decoder layer of Llama's shape as one compiled call. Knows its parts; nothing of slots' contents and requests.

No model is known by its name: a layer that has exactly these parts is tried on random rows beside its own code, and
keeps its own code unless both agree.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loractl.server.engine.kernels import native
from loractl.server.engine.kernels.attention import PagedBatch, paged_struct
from loractl.server.engine.kernels.linear import Int8Linear
from loractl.server.engine.kernels.lora import LoraBatch, LoraSite, LoraStep
from loractl.server.engine.kernels.packed import batch_struct, runs_native, site_struct

_TOLERANCE = 0.05
"""Of the largest change that a layer makes: roundings differ by less, another arithmetic by far more."""


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What a layer's own code asks of its attention, and the K and V blocks that are its own."""

    k: Tensor  # [blocks, block_size, kv_heads, dim]
    v: Tensor
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


class StepPlans:
    """The step's plans as the kernels read them, made once a step for all layers."""

    def __init__(self) -> None:
        self._paged: PagedBatch | None = None
        self._lora: LoraBatch | None = None
        self._paged_struct = native.PagedStruct()
        self._lora_struct: native.BatchStruct | None = None

    def paged(self, batch: PagedBatch) -> int:
        if batch is not self._paged:
            self._paged, self._paged_struct = batch, paged_struct(batch)
        return ctypes.addressof(self._paged_struct)

    def lora(self, batch: LoraBatch | None) -> int | None:
        if batch is not self._lora:
            self._lora, self._lora_struct = batch, None if batch is None else batch_struct(batch)
        return None if self._lora_struct is None else ctypes.addressof(self._lora_struct)


class FusedLayer:
    """Takes a layer's place in the forward pass; steps that it cannot run go to the layer's own code."""

    def __init__(self, layer: Any, options: AttentionOptions, *, lora: LoraStep, plans: StepPlans) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._own = type(layer).forward.__get__(layer)
        self._library = native.library()
        self._lora, self._plans = lora, plans
        self._linears: list[Int8Linear] = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        self._linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        self._sites: list[LoraSite | None] = [None] * len(self._linears)
        self._structs = [linear.packed.struct for linear in self._linears if linear.packed is not None]
        self._kept = (options, layer)  # what the struct points into
        self._following: FusedLayer | None = None
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.dtype = options.k.dtype
        sinks = None if options.sinks is None else options.sinks.float().contiguous()
        self._sinks = sinks
        heads = native.HeadsStruct(
            heads=self._linears[0].out_features // options.k.shape[3],
            kv_heads=options.k.shape[2],
            dim=options.k.shape[3],
            window=options.window or 0,
            sinks=None if sinks is None else sinks.data_ptr(),
            scale=options.scale,
            softcap=options.softcap or 0.0,
        )
        names = ("q", "k", "v", "o", "gate", "up", "down")
        self._struct = native.LayerStruct(
            **{name: ctypes.addressof(struct) for name, struct in zip(names, self._structs, strict=True)},
            norm=norms[0].weight.data_ptr(),
            mlp_norm=norms[1].weight.data_ptr(),
            q_norm=None if norms[2] is None else norms[2].weight.data_ptr(),
            k_norm=None if norms[3] is None else norms[3].weight.data_ptr(),
            k_cache=options.k.data_ptr(),
            v_cache=options.v.data_ptr(),
            heads=heads,
            norm_eps=_eps(norms[0]),
            mlp_norm_eps=_eps(norms[1]),
            head_norm_eps=0.0 if norms[2] is None else _eps(norms[2]),
        )

    def precede(self, following: "FusedLayer") -> None:
        """Fetch the adapters of the layer that runs next while this one computes."""
        self._following = following
        self._struct.next = ctypes.addressof(following._struct)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        paged, lora = self._lora.paged, self._lora.batch
        positions = kwargs.get("position_embeddings")
        if args or positions is None or paged is None or not self._is_ready(hidden_states, lora):
            own: Tensor = self._own(hidden_states, *args, **kwargs)
            return own
        library = self._library
        assert library is not None  # `fuse` makes no layer without it
        hidden = hidden_states.contiguous()
        cos, sin = (part.contiguous() for part in positions)
        out = torch.empty_like(hidden)
        library.loractl_layer(
            ctypes.addressof(self._struct),
            self._plans.paged(paged),
            self._plans.lora(lora),
            cos.data_ptr(),
            sin.data_ptr(),
            cos.shape[-1],
            hidden.data_ptr(),
            out.data_ptr(),
            hidden.dtype == torch.float32,
            torch.get_num_threads(),
        )
        return out

    def _is_ready(self, hidden: Tensor, lora: LoraBatch | None) -> bool:
        """Point each product at its part of the slots; False when the compiled layer cannot add an adapter's part."""
        if hidden.dtype != self.dtype:
            return False
        for index, (linear, struct) in enumerate(zip(self._linears, self._structs, strict=True)):
            site = linear.site
            struct.num_sites = 0
            if lora is None or site is None or not lora.slot_mask & (site.slot_mask | site.gain_mask):
                continue
            if self._sites[index] is not site:
                if not runs_native(site, lora, hidden):
                    return False
                self._sites[index] = site
                struct.sites[0] = site_struct(site)
            elif site.gain_mask & lora.slot_mask:
                return False
            struct.num_sites = 1
        return True


def has_fused_shape(layer: Any) -> bool:
    """Whether a layer has exactly the parts that the compiled one computes, in its dtypes."""
    if native.library() is None or _children(layer) != {
        "self_attn",
        "mlp",
        "input_layernorm",
        "post_attention_layernorm",
    }:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    projections = {"q_proj", "k_proj", "v_proj", "o_proj"}
    if _children(attention) not in (projections, projections | {"q_norm", "k_norm"}):
        return False
    if _children(mlp) != {"gate_proj", "up_proj", "down_proj", "act_fn"} or not _is_silu(mlp.act_fn):
        return False
    linears = [getattr(attention, name) for name in sorted(projections)]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if not all(isinstance(linear, Int8Linear) and linear.packed is not None for linear in linears):
        return False
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
    if not all(_is_norm(norm) for norm in norms) or not native.fits(*(norm.weight for norm in norms)):
        return False
    dim = attention.q_norm.weight.shape[0] if hasattr(attention, "q_norm") else attention.head_dim
    return int(dim) == int(attention.head_dim) and dim % 4 == 0 and linears[3].out_features % attention.head_dim == 0


def agrees(layer: Any, fused: FusedLayer, *, position_embeddings: Sequence[Tensor], hidden: Tensor) -> bool:
    """Whether the compiled layer changes `hidden` [1, rows, width] as the layer's own code does."""
    own: Any = type(layer).forward(layer, hidden, position_embeddings=position_embeddings, use_cache=False)
    own = own[0] if isinstance(own, tuple) else own
    mine = fused(hidden, position_embeddings=position_embeddings)
    change = (own - hidden).float()
    difference = (mine - own).float().abs().amax()
    return bool(torch.isfinite(difference)) and float(difference) <= _TOLERANCE * float(change.abs().amax())


def _children(module: Any) -> set[str]:
    return {name for name, _ in module.named_children()}


def _is_silu(module: Any) -> bool:
    x = torch.linspace(-4, 4, 9)
    return bool(torch.allclose(module(x), torch.nn.functional.silu(x)))


def _is_norm(module: Any) -> bool:
    return [name for name, _ in module.named_parameters()] == ["weight"] and _eps(module) > 0


def _eps(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))
