"""Moves an adapter between split layers and the packed one of a checkpoint (`W_pack`), exactly: PEFT's files both ways.

On a packed layer the parts' A lie one above the other and their B on the diagonal, so its rank is the sum of theirs;
on split layers every part has the packed A and its share of B's rows. Knows no base and no weights of one.
"""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loractl.adapters.config import LoraSpec, read_config
from loractl.adapters.digest import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, folder_digest
from loractl.adapters.errors import Incompatible, Unsupported, UsageError
from loractl.adapters.layout import PEFT_PREFIX, parse_tensor_name
from loractl.adapters.manifest import load_manifest, save_manifest
from loractl.adapters.packed_layers import PACKED_LAYERS, is_packed, row_shares

if TYPE_CHECKING:
    from torch import Tensor

Layout = Literal["w_pack", "split"]


@dataclass(frozen=True, slots=True)
class _Lora:
    """One module's LoRA: `a` [rank, in], `b` [out, rank], what their product is multiplied with, DoRA's magnitudes."""

    a: "Tensor"
    b: "Tensor"
    scaling: float
    magnitude: "Tensor | None" = None


def convert_adapter(folder: Path, layout: Layout, out: Path) -> Path:
    """Write the adapter in `folder` for the other layout of its base; raises Unsupported or Incompatible with why."""
    from safetensors.torch import load_file, save_file

    if out.exists():
        raise UsageError(f"{out} exists already", hint="choose another --out")
    spec = read_config((folder / CONFIG_FILE).read_bytes(), where=str(folder / CONFIG_FILE))
    loras = _read(load_file(folder / WEIGHTS_FILE), spec)
    converted = _pack(loras) if layout == "w_pack" else _split(loras)
    if converted.keys() == loras.keys():
        wanted = "q_proj, k_proj or v_proj" if layout == "w_pack" else "W_pack"
        raise Incompatible(f"{folder} has no adapter on {wanted}", hint="it is in that layout already")
    out.mkdir(parents=True)
    save_file(_tensors(converted), out / WEIGHTS_FILE, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG_FILE).read_text()) | _settings(converted)
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    manifest = load_manifest(folder)
    if manifest is not None:
        manifest.parent = folder_digest(folder)
        manifest.targets, manifest.rank = config["target_modules"], max(len(lora.a) for lora in converted.values())
        manifest.num_trainable_parameters = sum(lora.a.numel() + lora.b.numel() for lora in converted.values())
        save_manifest(manifest, out)
    if (folder / CARD_FILE).is_file():
        shutil.copyfile(folder / CARD_FILE, out / CARD_FILE)
    return out


def _read(tensors: "Mapping[str, Tensor]", spec: LoraSpec) -> dict[str, _Lora]:
    if spec.lora_bias or spec.bias != "none" or spec.modules_to_save or spec.trainable_token_indices:
        raise Unsupported(
            "only A, B and magnitudes can be converted", hint="this adapter trains biases or whole modules"
        )
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parsed = parse_tensor_name(name)
        if parsed.part not in {"a", "b", "magnitude"}:
            raise Unsupported(f"{name} cannot be converted", hint="only A, B and magnitudes can")
        parts.setdefault(parsed.module, {})[parsed.part] = tensor
    incomplete = next((module for module, found in parts.items() if not {"a", "b"} <= found.keys()), None)
    if incomplete:
        raise Incompatible(f"{incomplete} has no A or no B", hint="`loractl check` says more")
    return {
        module: _Lora(found["a"], found["b"], spec.scaling_of(module), found.get("magnitude"))
        for module, found in parts.items()
    }


def _pack(loras: Mapping[str, _Lora]) -> dict[str, _Lora]:
    packed: dict[str, _Lora] = {}
    for module, lora in loras.items():
        parent, dot, leaf = module.rpartition(".")
        whole = next((name for name, parts in PACKED_LAYERS.items() if leaf in parts), None)
        if whole is None:
            packed[module] = lora
        elif (name := f"{parent}{dot}{whole}") not in packed:
            packed[name] = _packed([loras.get(f"{parent}{dot}{part}") for part in PACKED_LAYERS[whole]], name)
    return packed


def _packed(parts: "list[_Lora | None]", name: str) -> _Lora:
    import torch

    there = [part for part in parts if part is not None]
    num_rows, scaling = len(there[0].b), there[0].scaling
    if any(len(part.b) != num_rows or part.a.shape[1] != there[0].a.shape[1] for part in there):
        raise Incompatible(f"{name}: the layers' sizes differ", hint="only layers of equal size lie in a packed one")
    magnitudes = [part.magnitude for part in there if part.magnitude is not None]
    if magnitudes and len(magnitudes) != len(parts):
        raise Unsupported(f"{name}: DoRA on some of the packed layers", hint="magnitudes of the others are the base's")
    a = torch.cat([part.a for part in there])
    b = there[0].b.new_zeros(num_rows * len(parts), len(a))
    column = 0
    for index, part in enumerate(parts):
        if part is not None:
            # Exact where the parts are scaled alike, as they are unless patterns say otherwise.
            rows = part.b if part.scaling == scaling else part.b * (part.scaling / scaling)
            b[index * num_rows : (index + 1) * num_rows, column : column + len(part.a)] = rows
            column += len(part.a)
    return _Lora(a, b, scaling, torch.cat(magnitudes) if magnitudes else None)


def _split(loras: Mapping[str, _Lora]) -> dict[str, _Lora]:
    split: dict[str, _Lora] = {}
    for module, lora in loras.items():
        if not is_packed(module):
            split[module] = lora
            continue
        for share in row_shares(module, len(lora.b)):
            rows = slice(share.start, share.stop)
            magnitude = lora.magnitude[rows] if lora.magnitude is not None else None
            split[share.module] = _Lora(lora.a, lora.b[rows], lora.scaling, magnitude)
    return split


def _tensors(loras: Mapping[str, _Lora]) -> "dict[str, Tensor]":
    tensors: dict[str, Tensor] = {}
    for module, lora in loras.items():
        # Cloned: safetensors refuses tensors that share memory, and split layers share their A.
        tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = lora.a.clone()
        tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = lora.b.clone()
        if lora.magnitude is not None:
            tensors[f"{PEFT_PREFIX}{module}.lora_magnitude_vector"] = lora.magnitude.clone()
    return tensors


def _settings(loras: Mapping[str, _Lora]) -> dict[str, Any]:
    """The settings of `adapter_config.json` that give every module its rank and scale, with patterns where they differ.

    rsLoRA becomes plain scaling: the root is in alpha then.
    """
    ranks = {module: len(lora.a) for module, lora in loras.items()}
    alphas = {module: lora.scaling * len(lora.a) for module, lora in loras.items()}
    rank, alpha = Counter((ranks[module], alphas[module]) for module in loras).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "use_rslora": False,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "target_modules": sorted({module.rpartition(".")[2] for module in loras}),
    }


def _pattern(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """Name the modules whose value is not the usual one: by leaf where a leaf has one value, else one by one."""
    by_leaf: dict[str, set[Any]] = {}
    for module, value in values.items():
        by_leaf.setdefault(module.rpartition(".")[2], set()).add(value)
    pattern: dict[str, Any] = {}
    for module, value in values.items():
        leaf = module.rpartition(".")[2]
        if len(by_leaf[leaf]) > 1:
            pattern[module] = value
        elif value != usual:
            pattern[leaf] = value
    return pattern
