"""Adds each packed row's adapters to a linear layer's output. Knows rows, slots and ranks; nothing of requests or
digests.

The slots are one slab `[slots, numbers]`; each layer sees its part of every slot through strided views (`LoraSite`),
so an adapter is loaded by one copy. Scaling (alpha / rank, rsLoRA) and DoRA's magnitudes are folded into B when it is
loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loractl.server.engine.kernels.attention import PagedBatch

GAIN_BIT = 1 << 16
"""In a slot's code on a card: the adapter brings DoRA's factor; the bits below are its rank."""
CHUNK_ROWS = 16
"""Rows of one adapter that a card's program takes: what a product of tiles has at least."""


@dataclass(frozen=True, slots=True)
class LoraSpan:
    """Rows `start` to `stop` of a step all run with `slots`: (slot, weight) pairs, summed; empty for the bare base."""

    start: int
    stop: int
    slots: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RowChunks:
    """A step's pairs as a card reads them: chunks of up to CHUNK_ROWS rows that run with one slot.

    A row with several adapters has one pair a round, so that no two programs of a round write the same numbers.
    """

    slots: Tensor  # [chunks] int32; -1: nothing
    rows: Tensor  # [chunks, CHUNK_ROWS] int32; -1: nothing
    weights: Tensor  # [chunks, CHUNK_ROWS] float32
    rounds: tuple[tuple[int, int], ...]  # (first chunk, end chunk)

    def to(self, device: torch.device | str) -> "RowChunks":
        return RowChunks(self.slots.to(device), self.rows.to(device), self.weights.to(device), self.rounds)

    @classmethod
    def build(cls, spans: Sequence[LoraSpan]) -> "RowChunks":
        """Plan on the host."""
        most = max(len(span.slots) for span in spans)
        chunks: list[tuple[int, list[tuple[int, float]]]] = []
        rounds: list[tuple[int, int]] = []
        for number in range(most):
            by_slot: dict[int, list[tuple[int, float]]] = {}
            for span in spans:
                if number < len(span.slots):
                    slot, weight = span.slots[number]
                    by_slot.setdefault(slot, []).extend((row, weight) for row in range(span.start, span.stop))
            first = len(chunks)
            for slot in sorted(by_slot):
                pairs = by_slot[slot]
                chunks += [(slot, pairs[at : at + CHUNK_ROWS]) for at in range(0, len(pairs), CHUNK_ROWS)]
            rounds.append((first, len(chunks)))
        rows = torch.full((len(chunks), CHUNK_ROWS), -1, dtype=torch.int32)
        weights = torch.zeros(len(chunks), CHUNK_ROWS)
        for index, (_, pairs) in enumerate(chunks):
            rows[index, : len(pairs)] = torch.tensor([row for row, _ in pairs], dtype=torch.int32)
            weights[index, : len(pairs)] = torch.tensor([weight for _, weight in pairs])
        return cls(torch.tensor([slot for slot, _ in chunks], dtype=torch.int32), rows, weights, tuple(rounds))


@dataclass(frozen=True, slots=True)
class LoraBatch:
    """Which slots each packed row of one step runs with; built once a step, read by every layer.

    Pair p says: row `rows[p]` adds slot `slots[p]` times `weights[p]`. Pairs are sorted by slot, so that rows of one
    adapter meet its weights while they are in the cache. `groups` holds (slot, first pair, end pair).
    """

    num_rows: int
    rows: Tensor  # [pairs] int64
    slots: Tensor  # [pairs] int64
    weights: Tensor  # [pairs] float32
    groups: tuple[tuple[int, int, int], ...]
    order: Tensor  # [rows] int32: rows sorted by their first slot
    firsts: Tensor  # [rows + 1] int32: row r's pairs are row_slots[firsts[r] : firsts[r + 1]]
    row_slots: Tensor  # [pairs] int32, sorted by row
    row_weights: Tensor  # [pairs] float32, sorted by row
    slot_mask: int
    """Bit s is set when slot s is used, so that a layer no adapter of the step touches is skipped for nothing."""
    chunks: RowChunks | None = None
    """The same pairs for a card."""
    is_recorded: bool = False
    """What the tensors hold changes between runs of a recorded step: nothing but they may decide what is computed."""

    @classmethod
    def build(
        cls,
        spans: Sequence[LoraSpan],
        *,
        num_rows: int,
        device: torch.device | str = "cpu",
        for_card: bool = False,
    ) -> "LoraBatch | None":
        """Return the plan of a step, or None when no row has an adapter."""
        by_slot: dict[int, list[tuple[LoraSpan, float]]] = {}
        for span in spans:
            for slot, weight in span.slots:
                by_slot.setdefault(slot, []).append((span, weight))
        if not by_slot:
            return None
        rows: list[int] = []
        weights: list[float] = []
        slots: list[int] = []
        groups: list[tuple[int, int, int]] = []
        for slot in sorted(by_slot):
            first = len(rows)
            for span, weight in by_slot[slot]:
                rows.extend(range(span.start, span.stop))
                weights.extend([weight] * (span.stop - span.start))
            slots.extend([slot] * (len(rows) - first))
            groups.append((slot, first, len(rows)))
        pair_rows = torch.tensor(rows, dtype=torch.int64)
        pair_slots = torch.tensor(slots, dtype=torch.int64)
        pair_weights = torch.tensor(weights, dtype=torch.float32)
        by_row = torch.argsort(pair_rows, stable=True)
        firsts = torch.zeros(num_rows + 1, dtype=torch.int32)
        firsts[1:] = torch.cumsum(torch.bincount(pair_rows, minlength=num_rows), 0)
        first_slot = torch.full((num_rows,), 1 << 30)
        first_slot.scatter_reduce_(0, pair_rows, pair_slots, reduce="amin")
        return cls(
            num_rows=num_rows,
            rows=pair_rows.to(device),
            slots=pair_slots.to(device),
            weights=pair_weights.to(device),
            groups=tuple(groups),
            order=torch.argsort(first_slot, stable=True).to(device, torch.int32),
            firsts=firsts.to(device),
            row_slots=pair_slots[by_row].to(device, torch.int32),
            row_weights=pair_weights[by_row].to(device),
            slot_mask=sum(1 << slot for slot in by_slot),
            chunks=RowChunks.build(spans).to(device) if for_card else None,
        )


@dataclass(slots=True)
class LoraSite:
    """One linear layer's part of every slot.

    a: [slots, rank_max, d_in], b: [slots, d_out, rank_max] (stored rank-major, so b is a transposed view), gain:
    [slots, d_out] holds DoRA's factor minus one, or None where the engine serves no DoRA. Beyond `ranks[slot]` a
    slot's content is never read.
    """

    a: Tensor
    b: Tensor
    gain: Tensor | None = None
    ranks: list[int] = field(default_factory=list)
    rank_table: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))
    """`ranks` as the compiled kernels read them."""
    slot_mask: int = 0
    gain_mask: int = 0
    card_codes: Tensor | None = None
    """[slots] int32 on a card, strided: each slot's rank and GAIN_BIT, read while the step runs."""

    @property
    def codes(self) -> Tensor:
        """What a card reads of the slots; made from `ranks` where no table is kept beside the slab."""
        if self.card_codes is None:
            found = [rank | GAIN_BIT * (self.gain_mask >> slot & 1) for slot, rank in enumerate(self.ranks)]
            return torch.tensor(found, dtype=torch.int32, device=self.a.device)
        return self.card_codes

    @staticmethod
    def numel(*, d_in: int, d_out: int, rank_max: int, with_gain: bool) -> int:
        """Numbers that a slot needs for this layer; a multiple of 32, so that every part starts on a cache line."""
        return sum(_padded(size) for size in _part_sizes(d_in, d_out, rank_max, with_gain=with_gain))

    @classmethod
    def carve(
        cls, slab: Tensor, offset: int, *, d_in: int, d_out: int, rank_max: int, with_gain: bool = False
    ) -> "LoraSite":
        """View a layer's part, which starts at `offset`, of `slab` [slots, numbers]."""
        size_a, size_b, size_gain = _part_sizes(d_in, d_out, rank_max, with_gain=with_gain)
        num_slots = slab.shape[0]
        a = slab.narrow(1, offset, size_a).view(num_slots, rank_max, d_in)
        b = slab.narrow(1, offset + _padded(size_a), size_b).view(num_slots, rank_max, d_out).transpose(1, 2)
        gain = slab.narrow(1, offset + _padded(size_a) + _padded(size_b), size_gain) if with_gain else None
        return cls(a=a, b=b, gain=gain, ranks=[0] * num_slots, rank_table=torch.zeros(num_slots, dtype=torch.int32))

    def set_slot(self, slot: int, *, rank: int, has_gain: bool = False) -> None:
        """Say what was loaded into `slot`: rank 0 when its adapter leaves this layer alone."""
        bit = 1 << slot
        if self.ranks[slot] == rank and has_gain == bool(self.gain_mask & bit):
            return  # as the adapter before it: most are of one recipe
        self.ranks[slot] = rank
        self.rank_table[slot] = rank
        self.slot_mask = self.slot_mask | bit if rank else self.slot_mask & ~bit
        self.gain_mask = self.gain_mask | bit if has_gain else self.gain_mask & ~bit


@dataclass(slots=True)
class LoraStep:
    """The plan of the step that runs now; one object shared by all layers of a model."""

    batch: LoraBatch | None = None
    paged: PagedBatch | None = None
    quantized: tuple[Tensor, Tensor, Tensor] | None = None
    """On a card: the rows that were last quantized, kept so that their place is not reused, their codes and scales."""


def add_lora_reference(out: Tensor, x: Tensor, site: LoraSite, batch: LoraBatch, *, bias: Tensor | None = None) -> None:
    """Add the adapters' part to `out` [rows, d_out] in place, one pair at a time in float32: the oracle of the fast
    paths."""
    base = out.float() if bias is None else out.float() - bias.float()
    total = out.float()
    for row, slot, weight in zip(batch.rows.tolist(), batch.slots.tolist(), batch.weights.tolist(), strict=True):
        rank = site.ranks[slot]
        total[row] += weight * (site.b[slot, :, :rank].float() @ (site.a[slot, :rank].float() @ x[row].float()))
        if site.gain is not None and site.gain_mask >> slot & 1:
            total[row] += weight * site.gain[slot].float() * base[row]
    out.copy_(total)


def add_lora(out: Tensor, x: Tensor, site: LoraSite, batch: LoraBatch, *, bias: Tensor | None = None) -> None:
    """Add the adapters' part to `out` in place.

    out: [rows, d_out], x: [rows, d_in], both contiguous and of the slab's dtype. `bias` is what `out` already
    contains of a bias: DoRA scales the product without it.
    """
    used = batch.slot_mask & (site.slot_mask | site.gain_mask)
    if not used and not batch.is_recorded:
        return
    if batch.chunks is not None:
        from loractl.server.engine.kernels.cuda.grouped_lora import add_lora_on_card

        add_lora_on_card(out, x, site, batch.chunks, bias=bias, with_gain=bool(batch.slot_mask & site.gain_mask))
        return
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for slot, first, end in batch.groups:
        if not used >> slot & 1:
            continue
        rows, weights = batch.rows[first:end], batch.weights[first:end, None]
        rank = site.ranks[slot]
        if rank:
            hidden = x[rows].float() @ site.a[slot, :rank].float().T  # [group, rank]
            total.index_add_(0, rows, (hidden * weights) @ site.b[slot, :, :rank].float().T)
        if site.gain is not None and site.gain_mask >> slot & 1:
            base = out[rows].float() if bias is None else out[rows].float() - bias.float()
            total.index_add_(0, rows, base * site.gain[slot].float() * weights)
    out.copy_(out.float() + total)


def _part_sizes(d_in: int, d_out: int, rank_max: int, *, with_gain: bool) -> tuple[int, int, int]:
    return rank_max * d_in, rank_max * d_out, d_out if with_gain else 0


def _padded(size: int) -> int:
    return -(-size // 32) * 32
