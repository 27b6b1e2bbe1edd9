"""Brings adapters' numbers into their slots while steps go on: pinned memory, a stream of its own, an event each.

Knows slots and numbers. On a CPU a copy is done when it is begun.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from loractl.server.engine.kernels.lora import GAIN_BIT, LoraSite


class Lane(Protocol):
    """Where copies run beside the steps."""

    def begin(self, copy: Callable[[], None]) -> Callable[[], bool]:
        """Begin a copy and return what tells whether it has ended."""
        ...


class CudaLane:
    """A stream of its own, so that no step waits for a copy; a copy waits for the steps that were launched before it,
    which may read what it writes over."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, copy: Callable[[], None]) -> Callable[[], bool]:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            copy()
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event.query


class DirectLane:
    """Copies at once."""

    def begin(self, copy: Callable[[], None]) -> Callable[[], bool]:
        copy()
        return _is_done


def make_lane(device: torch.device) -> Lane:
    return CudaLane(device) if device.type == "cuda" else DirectLane()


class SlabCopies:
    """The copies into one slab [slots, numbers], and beside it the table of ranks that a card's kernels read."""

    def __init__(self, slab: Tensor, sites: Sequence[LoraSite], *, lane: Lane) -> None:
        self._slab, self._sites, self._lane = slab, sites, lane
        is_cuda = slab.device.type == "cuda"
        self._host_codes = torch.zeros(slab.shape[0], len(sites), dtype=torch.int32, pin_memory=is_cuda)
        self._codes = torch.zeros(slab.shape[0], len(sites), dtype=torch.int32, device=slab.device)
        for index, site in enumerate(sites):
            site.card_codes = self._codes[:, index]
        self._arriving: dict[int, Callable[[], bool]] = {}

    def begin(self, slot: int, row: Tensor) -> None:
        """Begin to copy `row`, whose ranks the sites have been told, into a slot that no running step reads."""
        codes: Any = self._host_codes[slot].numpy()
        codes[:] = [site.ranks[slot] | GAIN_BIT * (site.gain_mask >> slot & 1) for site in self._sites]

        def copy() -> None:
            self._slab[slot].copy_(row, non_blocking=True)
            self._codes[slot].copy_(self._host_codes[slot], non_blocking=True)

        self._arriving[slot] = self._lane.begin(copy)

    def has_arrived(self, slot: int) -> bool:
        """Whether a step may read the slot."""
        is_done = self._arriving.get(slot)
        if is_done is not None and is_done():
            del self._arriving[slot]
        return slot not in self._arriving


def _is_done() -> bool:
    return True
