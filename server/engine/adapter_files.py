"""An adapter folder as the engine needs it: checked against the base, B scaled, cast. Knows files; no slots."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loractl.adapters.config import LoraSpec, read_config
from loractl.adapters.digest import CONFIG_FILE
from loractl.adapters.errors import AdapterInvalid, BaseMismatch, NotFound, TargetsMissing, Unsupported
from loractl.adapters.layout import LoraLayout, LoraModule, lay_out
from loractl.adapters.manifest import load_manifest
from loractl.adapters.tensors import TensorFile, open_tensors

WEIGHTS_FILE = "adapter_model.safetensors"

# What the slots cannot express; each would change answers silently if it were left out.
_UNSERVED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
)


@dataclass(frozen=True, slots=True)
class Part:
    """One layer's LoRA: a [rank, d_in], b [d_out, rank] with the scaling folded in; float32."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedBase:
    """What an adapter is checked against: who the base is, and (d_in, d_out) of the layers that slots reach."""

    fingerprint: str
    shapes: Mapping[str, tuple[int, int]]
    max_rank: int
    truncate_rank: bool


@dataclass(frozen=True, slots=True)
class CheckedAdapter:
    """An adapter that fits; its tensors are mapped, not yet read."""

    spec: LoraSpec
    modules: Mapping[str, LoraModule]
    tensors: TensorFile
    max_rank: int

    def part(self, name: str) -> Part:
        """Read one layer's matrices; above `max_rank`, the best approximation of their product."""
        module = self.modules[name]
        assert module.a is not None
        assert module.b is not None
        a = torch.from_numpy(self.tensors.read_float32(module.a.name).copy())
        b = torch.from_numpy(self.tensors.read_float32(module.b.name).copy()) * self.spec.scaling_of(name)
        return Part(a, b) if a.shape[0] <= self.max_rank else _truncated(a, b, rank=self.max_rank)

    @property
    def rank(self) -> int:
        return min(self.max_rank, max(module.rank or 0 for module in self.modules.values()))


def check_adapter(folder: Path, base: ServedBase) -> CheckedAdapter:
    """Check that a folder's adapter can be served on this base; raises NotFound, Incompatible or AdapterInvalid."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise NotFound(f"{folder}: no {name}")
    spec = read_config((folder / CONFIG_FILE).read_bytes(), where=str(folder / CONFIG_FILE))
    _check_base(folder, base)
    _check_features(folder, spec)
    tensors = open_tensors(folder / WEIGHTS_FILE)
    layout = lay_out(tensors.entries.values())
    _check_rest(folder, layout)
    _check_targets(folder, layout, base)
    for module in layout.modules.values():
        _check_module(folder, module, spec, base)
    return CheckedAdapter(spec, layout.modules, tensors, base.max_rank)


def _check_base(folder: Path, base: ServedBase) -> None:
    manifest = load_manifest(folder)
    if manifest is not None and manifest.base is not None and manifest.base.fingerprint != base.fingerprint:
        raise BaseMismatch(
            f"{folder.name} was trained on another base ({manifest.base.fingerprint[:19]})",
            hint=f"this engine serves {base.fingerprint[:19]}",
        )


def _check_features(folder: Path, spec: LoraSpec) -> None:
    for name in _UNSERVED:
        if getattr(spec, name):
            raise Unsupported(f"{folder.name}: {name} is not served", hint="merge it, or train without it")
    if spec.bias != "none":
        raise Unsupported(f"{folder.name}: bias={spec.bias!r} is not served", hint="train with bias 'none'")


def _check_rest(folder: Path, layout: LoraLayout) -> None:
    rest = [*layout.whole, *layout.tokens, *layout.base_weights]
    if rest:
        raise Unsupported(f"{folder.name}: {rest[0]} is saved whole, which is not served", hint="train LoRA alone")


def _check_targets(folder: Path, layout: LoraLayout, base: ServedBase) -> None:
    embeddings = [module.name for module in layout.modules.values() if module.is_embedding]
    unreached = [name for name in layout.modules if name.rpartition(".")[2] in {"lm_head", "embed_out"}]
    if embeddings or unreached:
        raise Unsupported(
            f"{folder.name}: an adapter on {(embeddings or unreached)[0]} is not served",
            hint="target the linear layers of attention and MLP",
        )
    missing = [name for name in layout.modules if name not in base.shapes]
    if missing:
        kinds = sorted({name.rpartition(".")[2] for name in base.shapes})
        raise TargetsMissing(f"{folder.name}: the base has no {missing[0]}", hint=f"it has {', '.join(kinds)}")


def _check_module(folder: Path, module: LoraModule, spec: LoraSpec, base: ServedBase) -> None:
    if module.a is None or module.b is None:
        raise AdapterInvalid(f"{folder.name}: {module.name} lacks one of A and B")
    if module.magnitude is not None or module.bias is not None:
        raise Unsupported(f"{folder.name}: {module.name} has DoRA's magnitude or a bias, which are not served")
    d_in, d_out = base.shapes[module.name]
    rank = spec.rank_of(module.name)
    if module.a.shape != (rank, d_in) or module.b.shape != (d_out, rank):
        raise AdapterInvalid(
            f"{folder.name}: {module.name} is {list(module.a.shape)} and {list(module.b.shape)}",
            hint=f"rank {rank} on this base is [{rank}, {d_in}] and [{d_out}, {rank}]",
        )
    if rank > base.max_rank and not base.truncate_rank:
        raise Unsupported(
            f"{folder.name}: rank {rank} is above the engine's {base.max_rank}", hint=f"serve with --max-rank {rank}"
        )


def _truncated(a: Tensor, b: Tensor, *, rank: int) -> Part:
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return Part((q_a @ v.T)[:, :rank].T.contiguous(), (q_b @ u * s)[:, :rank].contiguous())
