"""From an adapter's files to the numbers of one slot, or the reason why this engine cannot serve it. Knows no slots.

Scaling, rank patterns and DoRA's factors are folded in here, so that a step multiplies and adds and nothing else.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from loractl.adapters.config import LoraSpec, read_config
from loractl.adapters.digest import CONFIG_FILE, WEIGHTS_FILE
from loractl.adapters.errors import AdapterInvalid, Incompatible, Unsupported
from loractl.adapters.layout import LoraLayout, LoraModule, lay_out
from loractl.adapters.packed_layers import is_packed, row_shares
from loractl.adapters.tensors import MappedFile, TensorFile, map_tensors
from loractl.server.engine.adapter_packing import MatrixPair, PackPlan, PackPlans
from loractl.server.engine.kernels.linear import PackedLinear
from loractl.server.engine.kernels.lora import LoraSite
from loractl.server.engine.side_lora import SidePart

# A copy of the base's weights may have been saved in another dtype, or be compared with 8-bit ones.
_ROUNDING = 0.02

log = logging.getLogger("loractl.server.engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedLayers:
    """Where adapters may reach: the base's linear layers, its head and its input embedding, by their names."""

    linear: Mapping[str, PackedLinear]
    head_name: str
    head: PackedLinear
    embedding_name: str
    embedding_weight: Tensor  # [vocabulary, hidden]
    embedding_scale: float
    """What the base multiplies its embedding with (Gemma); PEFT does so with an adapter's part too."""
    is_tied: bool


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter ready to be copied: one slot's numbers, the rank at each layer, and what lies outside the slab."""

    row: Tensor  # [numbers]
    ranks: Mapping[str, int]
    gains: frozenset[str] = frozenset()
    """Layers whose DoRA factor is in `row`."""
    sides: Mapping[str, SidePart] = field(default_factory=dict[str, SidePart])
    energy_kept: float = 1.0
    """Share of the squared change that is left after ranks were cut to the slots'; 1.0 when none was."""

    @property
    def rank(self) -> int:
        return max([*self.ranks.values(), *(part.a.shape[0] for part in self.sides.values())])

    @property
    def size_bytes(self) -> int:
        sides = sum(part.size_bytes for part in self.sides.values())
        return self.row.numel() * self.row.element_size() + sides


@dataclass(frozen=True, slots=True)
class _Piece:
    """What one of the base's layers gets of a module's tensors: rows `start` to `stop` of B and of the magnitude."""

    layer: str
    module: LoraModule
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Judged:
    """An adapter that can be served, as far as its config and its header tell."""

    spec: LoraSpec
    file: TensorFile
    layout: LoraLayout
    pieces: tuple[_Piece, ...]


class AdapterReader:
    """Reads adapters for slots of `max_rank`; with `truncate_rank` higher ranks are cut instead of refused, with `pin`
    into memory that a card copies from by itself."""

    def __init__(
        self, layers: ServedLayers, *, max_rank: int, truncate_rank: bool, dtype: torch.dtype, pin: bool = False
    ) -> None:
        self._pin = pin
        self._layers = layers
        self._max_rank = max_rank
        self._truncate = truncate_rank
        self._dtype = dtype
        self.num_numbers = sum(
            LoraSite.numel(d_in=x.in_features, d_out=x.out_features, rank_max=max_rank, with_gain=True)
            for x in layers.linear.values()
        )
        places = self.carve(torch.empty(1, self.num_numbers, dtype=dtype, device="meta"))
        self._places = {name: (int(x.a.storage_offset()), int(x.b.storage_offset())) for name, x in places.items()}
        self._plans = PackPlans()

    def carve(self, slab: Tensor) -> dict[str, LoraSite]:
        """View each linear layer's part of `slab` [slots, numbers]."""
        sites, offset = {}, 0
        for name, layer in self._layers.linear.items():
            d_in, d_out = layer.in_features, layer.out_features
            sites[name] = LoraSite.carve(slab, offset, d_in=d_in, d_out=d_out, rank_max=self._max_rank, with_gain=True)
            offset += LoraSite.numel(d_in=d_in, d_out=d_out, rank_max=self._max_rank, with_gain=True)
        return sites

    def check(self, folder: Path) -> None:
        """Raise Incompatible, Unsupported or AdapterInvalid unless a slot can hold the adapter in `folder`."""
        self._open(folder)

    def read(self, folder: Path) -> HostAdapter:
        """Read the whole adapter; raises as `check` does."""
        mapped, way = self._open(folder)
        return self._pack(mapped, way) if isinstance(way, PackPlan) else self._read_parts(way)

    def _open(self, folder: Path) -> tuple[MappedFile, PackPlan | _Judged]:
        """Judge an adapter, unless one of the same config and header was found good; returns the way to read it."""
        config = (folder / CONFIG_FILE).read_bytes()
        mapped = map_tensors(folder / WEIGHTS_FILE)
        plan = self._plans.find(config, mapped)
        if plan is not None:
            return mapped, plan
        spec = _read_spec(config, where=str(folder / CONFIG_FILE))
        file = mapped.check()
        layout = lay_out(file.entries.values())
        judged = _Judged(spec, file, layout, tuple(self._pieces(layout, spec)))
        plan = self._plan(judged)
        if plan is None:
            return mapped, judged
        self._plans.keep(config, mapped, plan)
        return mapped, plan

    def _plan(self, judged: _Judged) -> PackPlan | None:
        """How to read it by one call; None where something is to be computed first, or lies outside the slots' slab."""
        layout = judged.layout
        if layout.whole or layout.base_weights or self._dtype not in {torch.float32, torch.bfloat16}:
            return None
        pairs: dict[str, MatrixPair] = {}
        for piece in judged.pieces:
            a, b, places = piece.module.a, piece.module.b, self._places.get(piece.layer)
            if piece.module.magnitude is not None or places is None or a is None or b is None:
                return None
            if a.shape[0] > self._max_rank:
                return None
            scaling = judged.spec.scaling_of(piece.module.name)
            pairs[piece.layer] = MatrixPair(a, b, piece.start, piece.stop, scaling, *places)
        return PackPlan.build(pairs)

    def _pack(self, mapped: MappedFile, plan: PackPlan) -> HostAdapter:
        # On small pages: to find large ones for memory this short-lived took longer than the whole rest of a load.
        make = torch.zeros if self._pin else torch.empty
        row = make(self.num_numbers, dtype=self._dtype, pin_memory=self._pin)
        if not plan.pack(mapped, row):
            self._refuse_numbers()
        return HostAdapter(row, plan.ranks)

    def _read_parts(self, judged: _Judged) -> HostAdapter:
        """Read tensor by tensor, whatever it holds."""
        spec, file, layout = judged.spec, judged.file, judged.layout
        self._check_copies(file, layout)
        row = torch.zeros(1, self.num_numbers, dtype=self._dtype, pin_memory=self._pin)
        sites = self.carve(row)
        ranks: dict[str, int] = {}
        gains: set[str] = set()
        sides: dict[str, SidePart] = {}
        energy, energy_all = 0.0, 0.0
        for piece in judged.pieces:
            part = self._part(piece, file, spec)
            if piece.layer not in sites:
                gain = None if part.gain is None else part.gain.to(self._dtype)
                sides[piece.layer] = SidePart(part.a.to(self._dtype), part.b.to(self._dtype), gain)
                continue
            if part.a.shape[0] > self._max_rank:
                part, kept, all_of_it = _cut(part, self._max_rank)
                energy, energy_all = energy + kept, energy_all + all_of_it
            part = self._with_gain(piece, part, file)
            rank = ranks[piece.layer] = part.a.shape[0]
            site = sites[piece.layer]
            site.a[0, :rank] = part.a
            site.b[0, :, :rank] = part.b
            if part.gain is not None and site.gain is not None:
                site.gain[0] = part.gain
                gains.add(piece.layer)
        self._tie(sides, spec)
        if (embedding := sides.get(self._layers.embedding_name)) is not None:
            scaled = embedding.b * self._layers.embedding_scale
            sides[self._layers.embedding_name] = SidePart(embedding.a, scaled)
        self._check_finite(row, sides)
        kept_share = energy / energy_all if energy_all else 1.0
        if energy_all:
            log.warning(
                "an adapter of rank %d is served at rank %d: %.2f %% of its change is kept",
                spec.max_rank,
                self._max_rank,
                100 * kept_share,
            )
        return HostAdapter(row[0], ranks, frozenset(gains), sides, kept_share)

    def _check_finite(self, row: Tensor, sides: dict[str, SidePart]) -> None:
        """Refuse NaN and infinity before a request produces them; a sum sees both, in one pass and no memory."""
        numbers = [row, *(part for side in sides.values() for part in (side.a, side.b))]
        if not all(torch.isfinite(part.sum(dtype=torch.float32)) for part in numbers):
            self._refuse_numbers()

    def _refuse_numbers(self) -> NoReturn:
        dtype = str(self._dtype).removeprefix("torch.")
        raise AdapterInvalid(
            f"the adapter holds NaN or infinity, or numbers too large for {dtype}",
            hint="`loractl check` names the tensor; train it again with a lower rate",
        )

    def _part(self, piece: _Piece, file: TensorFile, spec: LoraSpec) -> SidePart:
        assert piece.module.a is not None
        assert piece.module.b is not None
        b = _tensor(file, piece.module.b.name)[piece.start : piece.stop] * spec.scaling_of(piece.module.name)
        part = SidePart(_tensor(file, piece.module.a.name), b)
        return self._with_gain(piece, part, file) if piece.layer == self._layers.head_name else part

    def _with_gain(self, piece: _Piece, part: SidePart, file: TensorFile) -> SidePart:
        """Fold DoRA in: the output is the whole product, the base's part included, times magnitude / norm."""
        if piece.module.magnitude is None:
            return part
        layer = self._layers.head if piece.layer == self._layers.head_name else self._layers.linear[piece.layer]
        norm = torch.linalg.norm(layer.dense_weight().cpu() + part.b @ part.a, dim=1)
        magnitude = _tensor(file, piece.module.magnitude.name).flatten()[piece.start : piece.stop]
        factor = magnitude / norm
        return SidePart(part.a, part.b * factor[:, None], factor - 1)

    def _tie(self, sides: dict[str, SidePart], spec: LoraSpec) -> None:
        """A tied head changes with the embedding, when the adapter was trained so."""
        embedding = sides.get(self._layers.embedding_name)
        if spec.ensure_weight_tying and self._layers.is_tied and embedding and self._layers.head_name not in sides:
            sides[self._layers.head_name] = SidePart(embedding.b.T.contiguous(), embedding.a.T.contiguous())

    def _pieces(self, layout: LoraLayout, spec: LoraSpec) -> Iterator[_Piece]:
        """What each layer gets; raises for what cannot be served, at the first one."""
        tables = {self._layers.embedding_name, self._layers.head_name}
        whole = {name.removesuffix(".weight") for name in layout.whole} | layout.base_weights.keys()
        if strange := sorted((whole - tables) | layout.tokens.keys()):
            raise Unsupported(f"the adapter holds whole weights of the base ({strange[0]}), which are not served")
        if not layout.modules:
            raise AdapterInvalid("the adapter changes no module")
        seen: set[str] = set()
        for module in layout.modules.values():
            for piece in self._divide(module):
                self._check_piece(piece, spec)
                if piece.layer in seen:
                    raise Unsupported(f"the adapter changes {piece.layer} twice")
                seen.add(piece.layer)
                yield piece

    def _check_copies(self, file: TensorFile, layout: LoraLayout) -> None:
        """Refuse an embedding or a head that is not this base's: PEFT saves them along when an adapter reaches one."""
        copies = [(name.removesuffix(".weight"), entry) for name, entry in layout.whole.items()]
        for name, entry in (*copies, *layout.base_weights.items()):
            is_head = name == self._layers.head_name and not self._layers.is_tied
            own = self._layers.head.dense_weight() if is_head else self._layers.embedding_weight.float()
            copy = _tensor(file, entry.name)
            if copy.shape != own.shape or (copy - own.cpu()).norm() > _ROUNDING * own.norm():
                raise Unsupported(f"the adapter brings a {name} of its own, which this server does not serve")

    def _divide(self, module: LoraModule) -> list[_Piece]:
        name = module.name
        if module.a is None or module.b is None:
            raise AdapterInvalid(f"{name} lacks one of its two matrices")
        if len(module.a.shape) != 2 or len(module.b.shape) != 2:
            raise Unsupported(f"{name} is no pair of matrices")
        if name not in self._layers.linear and is_packed(name):
            shares = row_shares(name, module.b.shape[0])
            if all(share.module in self._layers.linear for share in shares):
                return [_Piece(share.module, module, share.start, share.stop) for share in shares]
        return [_Piece(name, module, 0, module.b.shape[0])]

    def _check_piece(self, piece: _Piece, spec: LoraSpec) -> None:
        module, name = piece.module, piece.layer
        assert module.a is not None
        expected = self._expected_shape(name)
        if expected is None or module.is_embedding != (name == self._layers.embedding_name):
            raise Incompatible(f"this base has no layer {module.name} that an adapter can change")
        found = (module.a.shape[1], piece.stop - piece.start)
        if found != expected:
            raise Incompatible(f"{name} is {found} in the adapter, {expected} in the base")
        if module.is_embedding and module.magnitude is not None:
            raise Unsupported(f"the adapter uses DoRA on {name}, which this server does not serve")
        if spec.use_dora and module.magnitude is None:
            raise AdapterInvalid(f"{name}: use_dora is set, but there is no magnitude")
        rank = module.a.shape[0]
        if rank != spec.rank_of(module.name):
            # It would be scaled by the wrong rank; PEFT refuses it too.
            raise AdapterInvalid(f"{module.name} has rank {rank}, its config says {spec.rank_of(module.name)}")
        if rank > self._max_rank and not self._truncate:
            raise Unsupported(
                f"rank {rank} of {module.name} is above this server's {self._max_rank}",
                hint=f"serve with --max-rank {rank}",
            )

    def _expected_shape(self, name: str) -> tuple[int, int] | None:
        """(inputs, outputs) of a layer that adapters may change."""
        if name == self._layers.embedding_name:
            return int(self._layers.embedding_weight.shape[0]), int(self._layers.embedding_weight.shape[1])
        layer = self._layers.head if name == self._layers.head_name else self._layers.linear.get(name)
        return None if layer is None else (layer.in_features, layer.out_features)


def _read_spec(config: bytes, *, where: str) -> LoraSpec:
    spec = read_config(config, where=where)
    unsupported = {
        "use_qalora": spec.use_qalora,
        "use_bdlora": bool(spec.use_bdlora),
        "lora_bias": spec.lora_bias,
        f"bias={spec.bias}": spec.bias != "none",
        "modules_to_save": bool(spec.modules_to_save),
        "target_parameters": bool(spec.target_parameters),
        "trainable_token_indices": bool(spec.trainable_token_indices),
        "layer_replication": bool(spec.layer_replication),
        "alora_invocation_tokens": bool(spec.alora_invocation_tokens),
    }
    if named := [name for name, is_set in unsupported.items() if is_set]:
        raise Unsupported(f"the adapter uses {', '.join(named)}, which this server does not serve")
    return spec


def _cut(part: SidePart, rank: int) -> tuple[SidePart, float, float]:
    """The best approximation of B A at a lower rank, the squared change that it keeps, and the whole of it."""
    # B A = Qb (Rb Ra^T) Qa^T: the small matrix in the middle has the singular values of the large one.
    qb, rb = torch.linalg.qr(part.b)
    qa, ra = torch.linalg.qr(part.a.T)
    u, s, vh = torch.linalg.svd(rb @ ra.T)
    root = s[:rank].sqrt()
    b, a = qb @ (u[:, :rank] * root), (root[:, None] * vh[:rank]) @ qa.T
    return SidePart(a, b), float((s[:rank] ** 2).sum()), float((s**2).sum())


def _tensor(file: TensorFile, name: str) -> Tensor:
    return torch.from_numpy(file.read_float32(name).copy())
