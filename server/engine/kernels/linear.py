"""Linear layers on packed rows: int8 by rows, or dense, each with the step's adapters. Knows no model's layout."""

from typing import Any

import torch
from torch import Tensor, nn

from loractl.server.engine.kernels import device, native
from loractl.server.engine.kernels.lora import LoraSite, LoraStep, add_lora
from loractl.server.engine.kernels.packed import PackedWeight, runs_native


class PackedLinear(nn.Module):
    """A linear layer whose rows may each add adapters of their own.

    forward: x [..., d_in] to [..., d_out] in x's dtype; leading dimensions flatten to the step's packed rows. The
    engine sets `site` to the layer's part of the slots, or leaves it None where no adapter may reach.
    """

    def __init__(self, in_features: int, out_features: int, *, step: LoraStep) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.step = step
        self.site: LoraSite | None = None
        self.bias: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        out = self.base(rows)
        batch = self.step.batch
        if batch is not None and self.site is not None:
            add_lora(out, rows, self.site, batch, bias=self.bias)
        return out.view(*x.shape[:-1], self.out_features)

    def base(self, rows: Tensor) -> Tensor:
        """The product without adapters: rows [rows, d_in] to [rows, d_out], bias added."""
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        """The weight [d_out, d_in] in float32, dequantized where it is held in 8 or 4 bits; DoRA's norms need it at
        load."""
        raise NotImplementedError


class DenseLinear(PackedLinear):
    """A product with the weight as it is; weight: [d_out, d_in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, step: LoraStep) -> None:
        super().__init__(weight.shape[1], weight.shape[0], step=step)
        self.weight = weight
        self.bias = bias

    def base(self, rows: Tensor) -> Tensor:
        return nn.functional.linear(rows, self.weight, self.bias)

    def dense_weight(self) -> Tensor:
        return self.weight.float()


class ForeignLinear(PackedLinear):
    """A layer whose product stays its library's own (bitsandbytes' 4-bit)."""

    def __init__(self, inner: Any, *, step: LoraStep) -> None:
        super().__init__(inner.in_features, inner.out_features, step=step)
        self.inner = inner
        self.bias = inner.bias

    def base(self, rows: Tensor) -> Tensor:
        out: Tensor = self.inner(rows)
        return out.clone() if out is rows else out

    def dense_weight(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight: Tensor = dequantize_4bit(self.inner.weight.data, self.inner.weight.quant_state)
        return weight.float()


class Int8Linear(PackedLinear):
    """A product with int8 weights scaled by rows, as bitsandbytes holds them; x is quantized by rows too (threshold
    0.0).

    weight: [d_out, d_in] int8 (CB), row_absmax: [d_out] float32 (SCB); weight * row_absmax / 127 is the dense weight.
    """

    def __init__(self, weight: Tensor, row_absmax: Tensor, bias: Tensor | None, *, step: LoraStep) -> None:
        super().__init__(weight.shape[1], weight.shape[0], step=step)
        self.weight = weight
        self.row_scale = row_absmax.float() / 127
        self.bias = bias
        self._packed: PackedWeight | None = None
        self._on_card = device.runs_on_card(weight.device)
        if native.library() is not None and weight.device.type == "cpu" and not self._on_card:
            self._packed = PackedWeight.pack(weight, self.row_scale, bias)
            self.weight = weight.new_empty(0)  # held once, as panels

    @property
    def packed(self) -> PackedWeight | None:
        """The weight laid out for the compiled product, where that runs."""
        return self._packed

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None, *, step: LoraStep) -> "Int8Linear":
        """Quantize a dense weight by rows, with bitsandbytes' rule."""
        quantized, scale = quantize_rows(weight.float())
        return cls(quantized, scale * 127, bias, step=step)

    def forward(self, x: Tensor) -> Tensor:
        library, packed = native.library(), self._packed
        if library is None or packed is None or not native.fits(x):
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)
        site, batch = self.site, self.step.batch
        if site is None or batch is None or not batch.slot_mask & (site.slot_mask | site.gain_mask):
            out = packed.product(library, rows)
        elif runs_native(site, batch, rows):
            out = packed.product(library, rows, site=site, batch=batch)
        else:
            out = packed.product(library, rows)
            add_lora(out, rows, site, batch, bias=self.bias)
        return out.view(*x.shape[:-1], self.out_features)

    def base(self, rows: Tensor) -> Tensor:
        if self._on_card:
            return self._card_base(rows)
        quantized, scale = quantize_rows(rows)
        out = int8_product(quantized, self.codes()).float() * (scale[:, None] * self.row_scale)
        if self.bias is not None:
            out += self.bias
        return out.to(rows.dtype)

    def _card_base(self, rows: Tensor) -> Tensor:
        from loractl.server.engine.kernels.cuda.int8_matmul import int8_linear_on_card, quantize_rows_on_card

        kept = self.step.quantized
        # A layer's queries, keys and values are made of the same rows: they are quantized once.
        if kept is None or kept[0].data_ptr() != rows.data_ptr() or kept[0].shape != rows.shape:
            kept = self.step.quantized = (rows, *quantize_rows_on_card(rows))
        return int8_linear_on_card(kept[1], kept[2], self.weight, self.row_scale, self.bias, dtype=rows.dtype)

    def dense_weight(self) -> Tensor:
        return self.codes().float() * self.row_scale[:, None]

    def codes(self) -> Tensor:
        """The weight [d_out, d_in] int8."""
        return self.weight if self._packed is None else self._packed.unpack()


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [rows, d] as int8 and each row's scale [rows] float32: x is about int8 * scale."""
    wide = x.float()
    absmax = wide.abs().amax(dim=1)
    # a true division: `127 / absmax` multiplies by the reciprocal, and ties would round unlike the compiled kernel's
    factor = torch.where(absmax > 0, torch.full_like(absmax, 127) / absmax, 0.0)
    return torch.round(wide * factor[:, None]).to(torch.int8), absmax / 127


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [rows, d_in] int8 times weight [d_out, d_in] int8 transposed, exactly, as int32."""
    if x.is_cuda and (x.shape[0] <= 16 or x.shape[0] % 8):  # cuBLAS takes no fewer rows and whole eights
        rows = x.shape[0]
        padded = nn.functional.pad(x, (0, 0, 0, max(32, -(-rows // 8) * 8) - rows))
        return torch._int_mm(padded, weight.t())[:rows]
    return torch._int_mm(x, weight.t())


def packed_linear(module: nn.Module, *, step: LoraStep) -> PackedLinear | None:
    """Return the packed counterpart of a linear layer (torch's, bitsandbytes', GPT-2's Conv1D), or None for other
    modules."""
    kind = type(module).__name__
    weight: Any = getattr(module, "weight", None)
    bias: Any = getattr(module, "bias", None)
    bias = None if bias is None else bias.data
    if kind == "Linear8bitLt":
        state: Any = getattr(module, "state", None)
        codes = weight.CB if getattr(weight, "CB", None) is not None else state.CB
        absmax = weight.SCB if getattr(weight, "SCB", None) is not None else state.SCB
        return Int8Linear(codes.data, absmax.data, bias, step=step)
    if kind in {"Linear4bit", "LinearNF4", "LinearFP4"}:
        return ForeignLinear(module, step=step)
    if kind == "Conv1D":
        return DenseLinear(weight.data.t().contiguous(), bias, step=step)
    if isinstance(module, nn.Linear):
        return DenseLinear(weight.data, bias, step=step)
    return None


def replace_linears(
    model: nn.Module, *, step: LoraStep, int8_head: bool = False, dtype: torch.dtype | None = None
) -> dict[str, PackedLinear]:
    """Swap every linear layer of `model` in place and return the new ones by module name.

    With `int8_head` the output head, which bitsandbytes leaves dense, is held in int8 as well; a tied embedding keeps
    its own weight. `dtype` is what dense weights and biases are cast to.
    """
    replaced: dict[str, PackedLinear] = {}
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    for name, module in list(model.named_modules()):
        packed = packed_linear(module, step=step)
        if packed is None or any(name.startswith(f"{done}.") for done in replaced):
            continue
        if module is head and int8_head and isinstance(packed, DenseLinear):
            packed = Int8Linear.from_dense(packed.weight, packed.bias, step=step)
        if dtype is not None and isinstance(packed, DenseLinear):
            packed.weight = packed.weight.to(dtype)
        if dtype is not None and packed.bias is not None:
            packed.bias = packed.bias.to(dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed)
        replaced[name] = packed
    return replaced
