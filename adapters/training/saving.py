"""Writes a finished adapter: PEFT's two files, the manifest, the lock of the recipe and the card; all or nothing."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loractl.adapters.digest import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from loractl.adapters.errors import UsageError
from loractl.adapters.manifest import Manifest, save_manifest
from loractl.adapters.training.recipe import Recipe, save_lock


def check_out(folder: Path) -> None:
    """Raise UsageError where the result would overwrite something that is no adapter."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file())):
        raise UsageError(f"{folder} exists and holds no adapter", hint="choose another --out")


def save_adapter(
    model: Any,
    manifest: Manifest,
    recipe: Recipe | None,
    folder: Path,
    *,
    name: str = "default",
    start: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, str] | None = None,
) -> Path:
    """Save into a new folder beside `folder` and move it there; an older adapter in its place is replaced.

    `recipe` is None for an adapter that no training made, `name` the adapter among those in the model, `start` the
    tensors that it began with as a part of the base, `extra_files` more text files by name.
    """
    check_out(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
        staged = Path(work) / folder.name
        # "auto" would ask a hub on the network whether the vocabulary has grown; here it never does.
        model.save_pretrained(str(Path(work) / "peft"), save_embedding_layers=False, selected_adapters=[name])
        (Path(work) / "peft" / ("" if name == "default" else name)).rename(staged)
        if start:
            _subtract_start(staged, start)
        _name_base(staged, manifest)
        save_manifest(manifest, staged)
        if recipe is not None:
            save_lock(recipe, staged)
        (staged / CARD_FILE).write_text(card(manifest))
        for file_name, text in (extra_files or {}).items():
            (staged / file_name).write_text(text)
        if folder.exists():
            shutil.rmtree(folder)
        staged.rename(folder)
    return folder


def card(manifest: Manifest) -> str:
    """Return the adapter's README from its manifest, with the front matter that hubs read."""
    base, data = manifest.base, manifest.data
    facts = [
        f"- rank {manifest.rank} on {', '.join(manifest.targets)}",
        f"- {manifest.num_trainable_parameters:,} parameters" if manifest.num_trainable_parameters else "",
        f"- data {data.digest[:19]}, {data.num_rows} rows, {data.num_supervised_tokens} learned tokens" if data else "",
        _preference_fact(manifest),
        *(f"- {name} {value:g}" for name, value in manifest.metrics.items()),
    ]
    front = {
        "base_model": base.id if base else None,
        # Nobody said: who publishes the adapter replaces it.
        "license": "unknown",
        "datasets": (data.files or [data.digest]) if data else None,
        "library_name": "peft",
        "tags": ["lora", "peft"],
    }
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items() if value)
    pin = f"Base `{base.id}`, fingerprint `{base.fingerprint}`, held in {base.quantization}." if base else ""
    return f"---\n{head}\n---\n\n# LoRA adapter\n\n{pin}\n\n" + "\n".join(fact for fact in facts if fact) + "\n"


def _preference_fact(manifest: Manifest) -> str:
    if manifest.task != "preference":
        return ""
    part = manifest.recipe.get("preference") or {}
    against = f"adapter `{manifest.parent[:19]}`" if manifest.parent else "the base without adapter"
    settings = ", ".join(f"{name} {value:g}" for name, value in part.items() if value)
    return f"- direct preference optimization on pairs of answers against {against}: {settings}"


def _subtract_start(folder: Path, start: Mapping[str, Any]) -> None:
    """Save `BA - B0 A0` as one plain LoRA of twice the rank: what PEFT's own conversion does.

    The frozen twin holds A0 and -B0, so both are only put side by side.
    """
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / WEIGHTS_FILE
    whole = {}
    for key, tensor in load_file(path).items():
        twin = start[key].detach().to(tensor.device, tensor.dtype)
        whole[key] = torch.cat([tensor, twin], dim=0 if ".lora_A." in key else 1).contiguous()
    save_file(whole, path, metadata={"format": "pt"})
    config_path = folder / CONFIG_FILE
    config = json.loads(config_path.read_text())
    # The scale stays: alpha / r, or alpha / sqrt(r) where the adapter is rank-stabilized.
    config["lora_alpha"] *= 2**0.5 if config.get("use_rslora") else 2
    config["r"] *= 2
    config_path.write_text(json.dumps(config))


def _name_base(folder: Path, manifest: Manifest) -> None:
    """PEFT writes the path it loaded from; an adapter names its base, never a path."""
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = manifest.base.id if manifest.base else ""
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
