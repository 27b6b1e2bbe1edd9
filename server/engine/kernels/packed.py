"""An int8 weight laid out for the compiled product. Knows panels and pointers, nothing of modules."""

import ctypes
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loractl.server.engine.kernels import native
from loractl.server.engine.kernels.lora import LoraBatch, LoraSite

PANEL = 32


@dataclass(slots=True)
class PackedWeight:
    """weight: [d_out, d_in] int8, row_scale: [d_out] float32, bias: [d_out] or None, held as panels of 32 outputs."""

    panels: Tensor  # [panels, d_in / 4, 32, 4] int8, padded with zeros
    scales: Tensor  # [outputs, padded] float32
    offsets: Tensor  # [outputs, padded] int32: the product reads x + 128, this takes 128 * sum(weight) off again
    bias: Tensor | None
    d_in: int
    d_out: int
    _struct: native.LinearStruct = field(init=False)

    def __post_init__(self) -> None:
        self._struct = native.LinearStruct(
            panels=self.panels.data_ptr(),
            scales=self.scales.data_ptr(),
            offsets=self.offsets.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            d_in=self.d_in,
            d_out=self.d_out,
        )

    @property
    def struct(self) -> native.LinearStruct:
        """The weight as the kernels read it; whoever calls them says which sites it has."""
        return self._struct

    @classmethod
    def pack(cls, weight: Tensor, row_scale: Tensor, bias: Tensor | None) -> "PackedWeight":
        d_out, d_in = weight.shape
        outputs, inputs = -(-d_out // PANEL) * PANEL, -(-d_in // 4) * 4
        padded = torch.zeros(outputs, inputs, dtype=torch.int8)
        padded[:d_out, :d_in] = weight
        panels = padded.view(outputs // PANEL, PANEL, inputs // 4, 4).transpose(1, 2).contiguous()
        offsets = -128 * padded.sum(dim=1, dtype=torch.int32)
        wide_bias = None if bias is None else _padded(bias, outputs)
        return cls(panels, _padded(row_scale, outputs), offsets.to(torch.int32), wide_bias, d_in, d_out)

    def unpack(self) -> Tensor:
        """Return the weight [d_out, d_in] int8."""
        outputs, inputs = self.panels.shape[0] * PANEL, self.panels.shape[1] * 4
        return self.panels.transpose(1, 2).reshape(outputs, inputs)[: self.d_out, : self.d_in].contiguous()

    def product(
        self, library: ctypes.CDLL, rows: Tensor, *, site: LoraSite | None = None, batch: LoraBatch | None = None
    ) -> Tensor:
        """Return rows [rows, d_in] times the weight, bias and adapters added, in rows' dtype."""
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        out = torch.empty(rows.shape[0], self.d_out, dtype=rows.dtype)
        if not rows.shape[0]:
            return out
        plan = None
        self._struct.num_sites = 0
        if site is not None and batch is not None:
            plan = batch_struct(batch)
            self._struct.num_sites = 1
            self._struct.sites[0] = site_struct(site)
        library.loractl_linear(
            ctypes.addressof(self._struct),
            None if plan is None else ctypes.addressof(plan),
            rows.data_ptr(),
            rows.stride(0),
            out.data_ptr(),
            self.d_out,
            rows.shape[0],
            0,
            rows.dtype == torch.float32,
            torch.get_num_threads(),
        )
        return out


def runs_native(site: LoraSite, batch: LoraBatch, rows: Tensor) -> bool:
    """Whether the compiled product can add this site's adapters itself: the slab's dtype is x's, and no DoRA is in
    use."""
    return native.fits(rows, site.a) and not site.gain_mask & batch.slot_mask


def batch_struct(batch: LoraBatch) -> native.BatchStruct:
    return native.BatchStruct(
        order=batch.order.data_ptr(),
        firsts=batch.firsts.data_ptr(),
        slots=batch.row_slots.data_ptr(),
        weights=batch.row_weights.data_ptr(),
    )


def site_struct(site: LoraSite) -> native.SiteStruct:
    return native.SiteStruct(
        a=site.a.data_ptr(),
        b=site.b.data_ptr(),
        ranks=site.rank_table.data_ptr(),
        slot_stride=site.a.stride(0),
        first_output=0,
        num_outputs=site.b.shape[1],
    )


def _padded(values: Tensor, size: int) -> Tensor:
    out = torch.zeros(size, dtype=torch.float32)
    out[: values.shape[0]] = values
    return out
