"""Brings a mapped file into a slot's numbers by one compiled call. Knows places and formats; no judgement of adapters.

Adapters of one recipe differ in their numbers alone, so where each matrix lies and goes is found out once for all.
"""

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loractl.adapters.tensors import MappedFile, TensorEntry
from loractl.server.engine.kernels import native

_FORMATS = {"F32": 0, "BF16": 1, "F16": 2}
_MAX_PLANS = 16
_MAX_HEADER_BYTES = 256 << 10
"""Of a header that is kept: adapters of many experts have larger ones, and are read as they come."""


@dataclass(frozen=True, slots=True)
class MatrixPair:
    """A: [rank, in] and rows `start` to `stop` of B: [out, rank], and where both begin in a slot's numbers."""

    a: TensorEntry
    b: TensorEntry
    start: int
    stop: int
    scaling: float
    a_to: int
    b_to: int


@dataclass(frozen=True, slots=True)
class PackPlan:
    """All copies of an adapter's file, and the rank at each layer."""

    copies: ctypes.Array[native.MatrixCopyStruct]
    ranks: Mapping[str, int]

    @classmethod
    def build(cls, pairs: Mapping[str, MatrixPair]) -> "PackPlan | None":
        """Return the plan of a file of these layers; None where the call cannot read a format of it."""
        if native.library() is None or any(
            x.dtype not in _FORMATS for pair in pairs.values() for x in (pair.a, pair.b)
        ):
            return None
        copies = [copy for pair in pairs.values() for copy in _copies(pair)]
        ranks = {layer: pair.a.shape[0] for layer, pair in pairs.items()}
        return cls((native.MatrixCopyStruct * len(copies))(*copies), ranks)

    def pack(self, file: MappedFile, row: Tensor) -> bool:
        """Fill `row` [numbers], float32 or bfloat16, up to each rank; False: something is not finite."""
        library = native.library()
        assert library is not None  # `build` makes no plan without it
        mapped = np.frombuffer(file.source, dtype=np.uint8)
        is_finite = ctypes.c_uint8()
        library.loractl_pack_adapter(
            mapped.ctypes.data,
            mapped.size,
            ctypes.addressof(self.copies),
            len(self.copies),
            row.data_ptr(),
            ctypes.addressof(is_finite),
            row.dtype == torch.float32,
        )
        return bool(is_finite.value)


class PackPlans:
    """The plans of the last few kinds of file; loaders and those who resolve adapters share it."""

    def __init__(self) -> None:
        self._plans: OrderedDict[tuple[bytes, bytes, int], PackPlan] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, config: bytes, file: MappedFile) -> PackPlan | None:
        with self._lock:
            return self._plans.get((config, file.header, len(file.source)))

    def keep(self, config: bytes, file: MappedFile, plan: PackPlan) -> None:
        if len(file.header) > _MAX_HEADER_BYTES:
            return
        with self._lock:
            self._plans[config, file.header, len(file.source)] = plan
            if len(self._plans) > _MAX_PLANS:
                self._plans.popitem(last=False)


def _copies(pair: MatrixPair) -> tuple[native.MatrixCopyStruct, native.MatrixCopyStruct]:
    rank, width = pair.a.shape
    of_a = native.MatrixCopyStruct(
        source=pair.a.start, to=pair.a_to, rows=rank, columns=width, scale=1.0, format=_FORMATS[pair.a.dtype]
    )
    of_b = native.MatrixCopyStruct(
        source=pair.b.start + pair.start * pair.b.size_bytes // pair.b.shape[0],
        to=pair.b_to,
        rows=pair.stop - pair.start,
        columns=rank,
        scale=pair.scaling,
        format=_FORMATS[pair.b.dtype],
        is_turned=1,
    )
    return of_a, of_b
