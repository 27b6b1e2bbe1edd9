"""Finds each row's likeliest token, and rows that are not finite, in one pass. Knows numbers, no requests."""

import torch
from torch import Tensor

from loractl.server.engine.kernels import native


def scan_rows(x: Tensor) -> tuple[list[int], list[bool]]:
    """Return of each row of x [rows, numbers] the place of its largest number (the first of equals), and whether all
    are finite."""
    library = native.library()
    if library is None or not x.numel() or not native.fits(x) or not x.is_contiguous():
        return x.argmax(dim=-1).tolist() if x.numel() else [], torch.isfinite(x).all(dim=-1).tolist()
    best = torch.empty(x.shape[0], dtype=torch.int64)
    finite = torch.empty(x.shape[0], dtype=torch.bool)
    library.loractl_scan_rows(
        x.data_ptr(),
        x.shape[0],
        x.shape[1],
        best.data_ptr(),
        finite.data_ptr(),
        x.dtype == torch.float32,
        torch.get_num_threads(),
    )
    return best.tolist(), finite.tolist()
