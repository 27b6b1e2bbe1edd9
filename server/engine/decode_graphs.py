"""Decoding steps as recorded graphs on a card: one launch a step in place of thousands. Knows rows, blocks and slots.

Everything that changes between steps lies in buffers that stay where they are, filled on the host and sent by one copy;
graphs are recorded for a few batch sizes, each with and without adapters, and rows that only fill a batch up write to a
block of their own and read nothing.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from loractl.server.engine.kernels.attention import PagedBatch
from loractl.server.engine.kernels.lora import CHUNK_ROWS, LoraBatch, LoraStep, RowChunks

log = logging.getLogger("loractl.server.engine")

_MOST_BLOCKS = 2048
"""Longer sequences run unrecorded: their tables would be most of what a step sends."""

Forward = Callable[[Tensor, Tensor], Tensor]
"""Token ids and positions, [1, rows] each, to logits [rows, vocabulary]; reads the step's plans."""


class Recorder(Protocol):
    """Records what a call launches, so that it can be launched again as a whole."""

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return what runs it again, on what the buffers hold then, and returns its result."""
        ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory; two of them never run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # kernels are compiled and libraries wake up outside the recording
            run()
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def make_recorder(device: torch.device) -> Recorder | None:
    """The recorder of a device, or None where nothing can be recorded."""
    return CudaRecorder() if device.type == "cuda" else None


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One sequence's next token: where it stands, the blocks of its sequence, and at most one adapter."""

    token: int
    length: int
    blocks: Sequence[int]
    slot: int | None
    weight: float = 1.0
    source: int = 0
    """In a step that takes its tokens from the one before: the row there."""


class StepBuffers:
    """The numbers of a step for up to `num_rows` rows, on the host and on the device, at places that never change.

    The host has two sets, for it writes a step's numbers while those of the one before may still be on their way.
    """

    def __init__(self, *, num_rows: int, num_blocks: int, num_chunks: int, device: torch.device) -> None:
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "ids": ((num_rows,), torch.int64),
            "positions": ((num_rows,), torch.int64),
            "places": ((num_rows,), torch.int64),
            "sources": ((num_rows,), torch.int64),
            "lengths": ((num_rows,), torch.int32),
            "tables": ((num_rows, num_blocks), torch.int32),
            "slots": ((num_chunks,), torch.int32),
            "rows": ((num_chunks, CHUNK_ROWS), torch.int32),
            "weights": ((num_chunks, CHUNK_ROWS), torch.float32),
        }
        sizes = {name: -(-math.prod(shape) * dtype.itemsize // 16) * 16 for name, (shape, dtype) in shapes.items()}
        total = sum(sizes.values())
        self._hosts = [torch.zeros(total, dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(2)]
        self._device = torch.zeros(total, dtype=torch.uint8, device=device)
        self.device: dict[str, Tensor] = {}
        views: list[dict[str, Any]] = [{}, {}]
        at = 0
        for name, (shape, dtype) in shapes.items():
            size = math.prod(shape) * dtype.itemsize
            for view, host in zip(views, self._hosts, strict=True):
                view[name] = host[at : at + size].view(dtype).view(shape).numpy()
            self.device[name] = self._device[at : at + size].view(dtype).view(shape)
            at += sizes[name]
        self.host, self._other = views
        """Where the next step's numbers are written."""

    def send(self) -> None:
        """Copy all to the device; the host may write what comes next, and after that once this step has ended."""
        self._device.copy_(self._hosts[0], non_blocking=True)
        self._hosts.reverse()
        self.host, self._other = self._other, self.host


class DecodeGraphs:
    """Recorded steps by (rows, with adapters or without)."""

    def __init__(
        self,
        forward: Forward,
        *,
        step: LoraStep,
        recorder: Recorder,
        max_rows: int,
        num_slots: int,
        table_width: int,
        block_size: int,
        spare_block: int,
        device: torch.device,
    ) -> None:
        self.sizes = batch_sizes(max_rows)
        self._forward, self._step, self._recorder = forward, step, recorder
        self._num_slots, self._block_size = num_slots, block_size
        self._num_blocks = min(table_width, _MOST_BLOCKS)
        self._spare_place = spare_block * block_size
        self._buffers = StepBuffers(
            num_rows=self.sizes[-1],
            num_blocks=self._num_blocks,
            num_chunks=self._num_chunks(self.sizes[-1]),
            device=device,
        )
        self._starts = torch.arange(self.sizes[-1] + 1, dtype=torch.int32, device=device)
        self._tiles = torch.empty(0, 2, dtype=torch.int32, device=device)
        self._replays: dict[tuple[int, bool], Callable[[], Tensor]] = {}
        self.num_replays = 0
        self._fill([], self.sizes[-1])
        self._buffers.send()

    def record_all(self) -> bool:
        """Record every size, the largest first; False, with a warning, where this base cannot be recorded."""
        try:
            for size in reversed(self.sizes):
                for with_lora in (True, False):
                    self._replay_of(size, with_lora=with_lora)
        except RuntimeError as error:
            log.warning("decoding steps of this base cannot be recorded and run one launch at a time: %s", error)
            return False
        return True

    def takes(self, rows: Sequence[DecodeRow]) -> bool:
        """Whether a recorded step has room for these."""
        return 0 < len(rows) <= self.sizes[-1] and all(len(row.blocks) <= self._num_blocks for row in rows)

    def run(self, rows: Sequence[DecodeRow], chosen: Tensor | None = None) -> Tensor:
        """Return logits [rows, vocabulary], which the next call overwrites; with `chosen`, each row's token lies at
        its source there."""
        size = next(size for size in self.sizes if size >= len(rows))
        with_lora = any(row.slot is not None for row in rows)
        self._fill(rows, size)
        self._buffers.send()
        if chosen is not None:
            at = self._buffers.device
            torch.index_select(chosen, 0, at["sources"][: len(rows)], out=at["ids"][: len(rows)])
        logits = self._replay_of(size, with_lora=with_lora)()
        self.num_replays += 1
        return logits[: len(rows)]

    def _replay_of(self, size: int, *, with_lora: bool) -> Callable[[], Tensor]:
        found = self._replays.get((size, with_lora))
        if found is None:
            found = self._replays[size, with_lora] = self._recorder.record(self._step_of(size, with_lora=with_lora))
        return found

    def _step_of(self, size: int, *, with_lora: bool) -> Callable[[], Tensor]:
        at = self._buffers.device
        paged = PagedBatch(
            block_size=self._block_size,
            tables=at["tables"][:size],
            starts=self._starts[: size + 1],
            lengths=at["lengths"][:size],
            places=at["places"][:size],
            positions=at["positions"][:size],
            bounds=(),
            num_alone=size,
            tiles=self._tiles,
        )
        batch = self._lora_batch(size) if with_lora else None
        ids, positions = at["ids"][:size].unsqueeze(0), at["positions"][:size].unsqueeze(0)

        def run() -> Tensor:
            self._step.paged, self._step.batch, self._step.quantized = paged, batch, None
            return self._forward(ids, positions)

        return run

    def _lora_batch(self, size: int) -> LoraBatch:
        at, chunks = self._buffers.device, self._num_chunks(size)
        none = torch.empty(0, dtype=torch.int32, device=at["slots"].device)
        return LoraBatch(
            num_rows=size,
            rows=none.long(),
            slots=none.long(),
            weights=none.float(),
            groups=(),
            order=none,
            firsts=none,
            row_slots=none,
            row_weights=none.float(),
            slot_mask=0,
            chunks=RowChunks(at["slots"][:chunks], at["rows"][:chunks], at["weights"][:chunks], ((0, chunks),)),
            is_recorded=True,
        )

    def _num_chunks(self, size: int) -> int:
        """Chunks that `size` rows can need: each a full one, or a slot's last."""
        return min(size, size // CHUNK_ROWS + self._num_slots)

    def _fill(self, rows: Sequence[DecodeRow], size: int) -> None:
        host = self._buffers.host
        for name in ("ids", "positions", "lengths"):
            host[name][:size] = 0
        host["places"][:size] = self._spare_place
        by_slot: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            last = row.length - 1
            host["ids"][index], host["positions"][index], host["lengths"][index] = row.token, last, row.length
            host["sources"][index] = row.source
            host["places"][index] = row.blocks[last // self._block_size] * self._block_size + last % self._block_size
            host["tables"][index, : len(row.blocks)] = row.blocks
            if row.slot is not None:
                by_slot.setdefault(row.slot, []).append(index)
        host["slots"].fill(-1)
        host["rows"].fill(-1)
        chunk = 0
        for slot in sorted(by_slot):
            members = by_slot[slot]
            for first in range(0, len(members), CHUNK_ROWS):
                part = members[first : first + CHUNK_ROWS]
                host["slots"][chunk] = slot
                host["rows"][chunk, : len(part)] = part
                host["weights"][chunk, : len(part)] = [rows[index].weight for index in part]
                chunk += 1


def batch_sizes(max_rows: int) -> tuple[int, ...]:
    """Sizes that steps are recorded for: close together, for a row that fills up costs as much as a real one."""
    sizes = [
        size for size in (1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, 4097, 32)) if size < max_rows
    ]
    return (*sizes, max_rows)
