"""What the card's path is made of besides kernels: drawing tokens, copies beside steps, buffers of recorded steps."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from interpreted import RunsAgain
from loractl.server.engine.decode_graphs import DecodeGraphs, DecodeRow, StepBuffers, batch_sizes
from loractl.server.engine.kernels.lora import GAIN_BIT, LoraSite, LoraStep
from loractl.server.engine.messages import Sampling
from loractl.server.engine.row_choice import Draw, draw_tokens, pick_rows
from loractl.server.engine.sampler import RowSampler
from loractl.server.engine.slab_copies import SlabCopies

LONG = os.environ.get("LORACTL_DRILLS") == "long"
VOCABULARY = 50


def _allowed(row: Tensor, draw: Draw) -> set[int]:
    """Tokens that some random number may choose, by the sampler of single rows."""
    sampling = Sampling(
        temperature=draw.temperature, top_p=draw.top_p, top_k=draw.top_k, min_p=draw.min_p, seed=0, num_logprobs=0
    )
    sampler = RowSampler(sampling, prompt=(), eos_token_ids=frozenset())
    return {sampler.choose(row, []).token_id for _ in range(3000)}


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 8, "top_p": 0.7, "min_p": 0.05}]
)
def test_drawn_tokens_follow_the_distribution_that_single_rows_have(filters: dict[str, float]) -> None:
    torch.manual_seed(0)
    row = torch.randn(VOCABULARY) * 3
    draws = [Draw((index + 0.5) / 2000, 0.9, **filters) for index in range(2000)]  # type: ignore[arg-type]
    counts = torch.bincount(draw_tokens(row.expand(2000, -1), draws), minlength=VOCABULARY) / 2000
    probabilities = torch.softmax(row / 0.9, -1)
    allowed = _allowed(row, draws[0])
    for token in range(VOCABULARY):
        if token not in allowed:
            probabilities[token] = 0
    torch.testing.assert_close(counts, probabilities / probabilities.sum(), rtol=0, atol=3e-3)


def test_rows_are_chosen_alike_alone_and_together() -> None:
    torch.manual_seed(1)
    logits = torch.randn(6, VOCABULARY).bfloat16()
    logits[4, 7] = torch.inf
    draws = [None, Draw(0.3, 1.0), Draw(0.999999999, 1.0), Draw(0.5, 0.7, top_p=0.5), None, Draw(0.0, 2.0, min_p=0.5)]
    tokens, finite = pick_rows(logits, draws).read()
    assert finite == [True, True, True, True, False, True]
    for row, draw in enumerate(draws):
        assert pick_rows(logits[row : row + 1], [draw]).read()[0] == [tokens[row]]
    assert tokens[0] == int(logits[0].argmax())


class _HeldLane:
    """A copy that ends when the test says so."""

    def __init__(self) -> None:
        self.pending: list[Callable[[], None]] = []
        self.is_open = False

    def begin(self, copy: Callable[[], None]) -> Callable[[], bool]:
        self.pending.append(copy)
        return self._is_done

    def _is_done(self) -> bool:
        if self.is_open:
            while self.pending:
                self.pending.pop(0)()
        return self.is_open


def test_a_slot_is_not_there_before_its_copy_has_ended() -> None:
    numel = LoraSite.numel(d_in=32, d_out=32, rank_max=4, with_gain=True)
    slab = torch.zeros(3, 2 * numel)
    sites = [LoraSite.carve(slab, at * numel, d_in=32, d_out=32, rank_max=4, with_gain=True) for at in range(2)]
    lane = _HeldLane()
    copies = SlabCopies(slab, sites, lane=lane)
    sites[0].set_slot(1, rank=3)
    sites[1].set_slot(1, rank=2, has_gain=True)
    row = torch.randn(2 * numel)
    copies.begin(1, row)
    assert copies.has_arrived(0)
    assert not copies.has_arrived(1)
    assert not slab[1].any()
    lane.is_open = True
    assert copies.has_arrived(1)
    assert torch.equal(slab[1], row)
    assert [site.codes.tolist() for site in sites] == [[0, 3, 0], [0, 2 | GAIN_BIT, 0]]


def test_recorded_steps_find_each_row_in_the_buffers_and_fill_up_with_nothing() -> None:
    step, seen = LoraStep(), []

    def forward(ids: Tensor, positions: Tensor) -> Tensor:
        assert step.paged is not None
        chunks = None if step.batch is None else step.batch.chunks
        adapters = None if chunks is None else (chunks.slots.tolist(), chunks.rows[:, :3].tolist())
        paged = step.paged
        seen.append((ids.tolist(), positions.tolist(), paged.lengths.tolist(), paged.places.tolist(), adapters))
        return ids[0, :, None].float()

    recorder = RunsAgain()
    graphs = DecodeGraphs(
        forward,
        step=step,
        recorder=recorder,
        max_rows=6,
        num_slots=2,
        table_width=4,
        block_size=8,
        spare_block=9,
        device=torch.device("cpu"),
    )
    assert graphs.record_all()
    assert recorder.num_recorded == 2 * len(graphs.sizes) == 8
    rows = [DecodeRow(11, 9, [3, 5], 1, 0.5), DecodeRow(12, 1, [7], None), DecodeRow(13, 16, [2, 4], 1)]
    assert graphs.run(rows).flatten().tolist() == [11, 12, 13]
    ids, positions, lengths, places, adapters = seen[-1]
    assert (ids, positions) == ([[11, 12, 13, 0]], [[8, 0, 15, 0]])
    assert (lengths, places) == ([9, 1, 16, 0], [40, 56, 39, 72])
    assert adapters == ([1, -1], [[0, 2, -1], [-1, -1, -1]])
    assert graphs.run([DecodeRow(5, 2, [1], None)]).tolist() == [[5.0]]
    assert seen[-1] == ([[5]], [[1]], [2], [9], None)
    chosen = torch.tensor([21, 22, 23])
    assert graphs.run([DecodeRow(0, 3, [1], None, source=2), DecodeRow(0, 2, [4], 1)], chosen).tolist() == [
        [23.0],
        [21.0],
    ]
    assert seen[-1][0] == [[23, 21]]
    assert not graphs.takes([DecodeRow(5, 40, [1] * 5, None)])
    assert not graphs.takes(rows * 3)


def test_the_host_writes_a_steps_numbers_while_those_of_the_one_before_leave() -> None:
    buffers = StepBuffers(num_rows=2, num_blocks=1, num_chunks=1, device=torch.device("cpu"))
    first = buffers.host["ids"]
    first[:] = [1, 2]
    buffers.send()
    buffers.host["ids"][:] = [3, 4]
    assert (first.tolist(), buffers.device["ids"].tolist()) == ([1, 2], [1, 2])
    buffers.send()
    assert (first.tolist(), buffers.device["ids"].tolist()) == ([1, 2], [3, 4])
    assert buffers.host["ids"] is first


def test_bases_that_cannot_be_recorded_are_told_apart(caplog: pytest.LogCaptureFixture) -> None:
    class Refuses:
        def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
            raise RuntimeError("operation not permitted when stream is capturing")

    graphs = DecodeGraphs(
        lambda ids, _: ids,
        step=LoraStep(),
        recorder=Refuses(),
        max_rows=2,
        num_slots=1,
        table_width=1,
        block_size=8,
        spare_block=1,
        device=torch.device("cpu"),
    )
    assert not graphs.record_all()
    assert "one launch at a time" in caplog.text


def test_batch_sizes_reach_the_most_and_waste_little() -> None:
    assert batch_sizes(1) == (1,)
    assert batch_sizes(64)[-1] == 64
    for most in (3, 64, 100, 500):
        sizes = batch_sizes(most)
        assert sizes[-1] == most
        assert all(
            next(s for s in sizes if s >= rows) <= max(2 * rows, rows + 7, 1.13 * rows) for rows in range(1, most)
        )


@pytest.mark.drill
def test_every_kernel_compiles_for_cards() -> None:
    script = Path(__file__).parent.parent / "support" / "compile_kernels.py"
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), "80", "90", *(["--in-turns"] if not LONG else [])],
        capture_output=True,
        text=True,
        env=clean,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["arch"] for kernel in found} == {80, 90}
    for kernel in found:
        assert not kernel["spills"], kernel
        assert kernel["shared_bytes"] <= 100 * 1024, kernel  # what the smallest of these cards give a program
        assert kernel["tensor_cores"] or kernel["kernel"] in {"quantize", "write k and v", "attention, merge"}, kernel
