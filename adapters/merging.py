"""Merges adapters: one into a copy of its base, or several into one adapter, by PEFT. Knows no hub.

Merging into the base gives up what this product is for, and a merged weight that is quantized again is not the sum
that was trained; so the probes of the adapter's record are scored anew and the drift is told.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loractl.adapters.base_identity import BaseIdentity, check_same_base, identify_base
from loractl.adapters.base_loading import Dtype, load_base_model, load_tokenizer, quiet_libraries
from loractl.adapters.base_source import BaseSource
from loractl.adapters.config import read_config
from loractl.adapters.digest import CONFIG_FILE, folder_digest
from loractl.adapters.errors import Incompatible, UsageError
from loractl.adapters.manifest import Manifest, load_manifest
from loractl.adapters.training.probes import probe_drift
from loractl.adapters.training.saving import save_adapter

Method = Literal["sum", "linear", "svd", "ties", "dare_linear", "dare_ties"]

# PEFT's names; `sum` lays the factors side by side, which is the weighted sum of the changes, exactly.
_PEFT_METHODS: dict[Method, str] = {"sum": "cat"}
_SPARSE = {"ties", "dare_linear", "dare_ties"}
_OF_FACTORS = {"linear", *_SPARSE}


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge made; `drift` is the largest change of a probe's log probability, None without probes."""

    folder: Path
    drift: float | None = None


def merge_into_base(adapter: Path, source: BaseSource, out: Path, *, dtype: Dtype = "auto") -> Merged:
    """Add an adapter to a copy of its base and save that as an ordinary model folder.

    Raises BaseMismatch for another base's adapter, UsageError where `out` exists.
    """
    quiet_libraries()  # before PEFT imports what speaks
    from peft import PeftModel

    _check_new(out)
    manifest = _checked(adapter, identify_base(source.folder, base_id=source.id))
    base = load_base_model(source.folder, quantization="none", dtype=dtype)
    wrapped: Any = PeftModel.from_pretrained(base, str(adapter))
    try:
        model = wrapped.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise Incompatible(f"{adapter}: {error}", hint="`loractl check` says what is wrong with its weights") from error
    drift = probe_drift(model, manifest.probes) if manifest and manifest.probes else None
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
        staged = Path(work) / out.name
        model.save_pretrained(staged)
        load_tokenizer(source.folder).save_pretrained(staged)
        staged.rename(out)
    return Merged(out, drift)


def merge_together(
    adapters: Sequence[Path],
    source: BaseSource,
    out: Path,
    *,
    method: Method = "sum",
    weights: Sequence[float] | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> Merged:
    """Make one adapter of several.

    `density` is the share of entries that TIES and DARE keep, `seed` what DARE draws by. Raises BaseMismatch where they
    belong to different bases, Incompatible where the method cannot join them.
    """
    import torch

    quiet_libraries()  # before PEFT imports what speaks
    from peft import PeftModel

    _check_new(out)
    if len(adapters) < 2:
        raise UsageError("one adapter alone cannot be merged with others", hint="name several, or give --into-base")
    if weights is not None and len(weights) != len(adapters):
        raise UsageError(f"{len(weights)} weights for {len(adapters)} adapters")
    identity = identify_base(source.folder, base_id=source.id)
    for adapter in adapters:
        _checked(adapter, identity)
    ranks = [read_config((adapter / CONFIG_FILE).read_bytes()).max_rank for adapter in adapters]
    if method in _OF_FACTORS and len(set(ranks)) > 1:
        raise Incompatible(f"--method {method} needs equal ranks, these have {ranks}", hint="--method sum or svd")
    base = load_base_model(source.folder, quantization="none", dtype="float32")
    names = [f"part{number}" for number in range(len(adapters))]
    model: Any = PeftModel.from_pretrained(base, str(adapters[0]), adapter_name=names[0])
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(str(adapter), name)
    torch.manual_seed(seed)
    try:
        model.add_weighted_adapter(
            names,
            list(weights or [1.0] * len(names)),
            "merged",
            combination_type=_PEFT_METHODS.get(method, method),
            **({"density": density} if method in _SPARSE else {}),
        )
    except ValueError as error:
        raise Incompatible(f"these adapters cannot be merged by {method}: {error}") from error
    config = model.peft_config["merged"]
    manifest = Manifest(
        base=identity.pin(revision=source.revision),
        rank=config.r,
        targets=sorted(config.target_modules),
        recipe={
            "merge": {
                "method": method,
                "adapters": [folder_digest(adapter) for adapter in adapters],
                "weights": list(weights or [1.0] * len(names)),
                **({"density": density, "seed": seed} if method in _SPARSE else {}),
            }
        },
    )
    save_adapter(model, manifest, None, out, name="merged")
    return Merged(out)


def _checked(adapter: Path, identity: BaseIdentity) -> Manifest | None:
    manifest = load_manifest(adapter)
    check_same_base(manifest.base if manifest else None, identity, adapter=adapter)
    return manifest


def _check_new(out: Path) -> None:
    if out.exists():
        raise UsageError(f"{out} exists already", hint="choose another --out")
