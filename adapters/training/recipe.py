"""A recipe: every setting of a training run, from preset, file and flags, resolved and checked. Loads nothing."""

import difflib
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from loractl.adapters.base_loading import Dtype
from loractl.adapters.errors import BadRecipe
from loractl.adapters.manifest import Quantization

_EXPONENT = re.compile(r"^[+-]?\d+(\.\d*)?[eE][+-]?\d+$")
LOCK_FILE = "recipe.lock.yaml"


class AdapterPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What is trained: rank, scale and reach of the adapter."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = msgspec.field(default_factory=lambda: ["all-linear"])
    rslora: bool = False
    dora: bool = False
    """A magnitude per output beside the low-rank part; PEFT serves it, multi-adapter servers (ours too) do not."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "eva"] = "default"
    """How A and B begin; pissa and olora are saved at twice the rank, so that the base stays what it is."""
    start_from: str | None = None
    """An adapter folder whose weights training starts from; rank and targets are then its own."""


class TrainPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How it is trained; one optimizer step sees batch_size x accumulation rows."""

    epochs: float = 1.0
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float | Literal["auto"] = 2e-4
    """`auto` follows the width of the base; the lock holds the number."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    """Share of the steps over which the rate rises; then it follows the schedule."""
    optimizer: Literal["auto", "adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """The 8-bit ones are bitsandbytes' and need CUDA; `auto` is the paged one there, else torch's."""
    lora_plus: float | None = None
    """How much faster B learns than A (LoRA+); None is the same rate for both."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    checkpoint_activations: bool | None = None
    """Compute activations again in the backward pass; None is only where the run would not fit otherwise."""
    expand_int8: bool | None = None
    """Hold int8 weights expanded while training on a CPU: faster, two or four bytes more a weight. None is yes."""
    eval_every: int = 0
    """Optimizer steps between evaluations; 0 is at the end alone, or each epoch where patience asks for it."""
    patience: int = 0
    """Evaluations without a better loss before the run stops; 0 never stops early."""
    keep_best: bool = True
    """Save the weights of the best evaluation, not the last ones, where there is more than one."""
    save_every: int = 0
    """Optimizer steps between checkpoints; 0 is every ten minutes."""


class DataPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Which rows, how they become text, and how long they may be."""

    files: list[str] = []
    """Files, folders of files, or hub datasets as `hf:ORG/NAME`."""
    template: str | None = None
    """How columns become text, as "Review: {text} Label: {label}"; the last one is the answer and is learned."""
    answers: Literal["every", "last"] = "every"
    """Which answers of a conversation are learned."""
    max_tokens: int | Literal["auto"] = "auto"
    """Longest row; `auto` is the base's window, and the lock holds the number."""
    overlong: Literal["auto", "drop", "truncate", "error"] = "auto"
    """What becomes of longer rows; `auto` drops up to one in a hundred and refuses more."""
    eval_share: float = 0.05
    """Share of the rows that is held out; rows of one conversation stay together."""
    eval_files: list[str] = []
    """Rows to hold out instead of a share."""


class PreferencePart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How pairs of answers are learned: by DPO against the model that the run began with; other rows ignore it."""

    beta: float = 0.1
    """How dearly the model pays for leaving what it began as; less lets it go farther."""
    label_smoothing: float = 0.0
    """Share of the pairs that are taken to be the wrong way round (conservative DPO)."""
    sft_weight: float = 0.0
    """Weight of the chosen answers' own loss per token beside it (RPO's alpha)."""


class Recipe(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """All settings of one run."""

    base: str = ""
    out: str = ""
    quantize: Quantization = "int8"
    dtype: Dtype = "auto"
    adapter: AdapterPart = msgspec.field(default_factory=AdapterPart)
    train: TrainPart = msgspec.field(default_factory=TrainPart)
    data: DataPart = msgspec.field(default_factory=DataPart)
    preference: PreferencePart = msgspec.field(default_factory=PreferencePart)


def resolve_recipe(*, preset: str | None, file: Path | None, settings: Mapping[str, Any]) -> Recipe:
    """Lay flags over the file over the preset; `settings` has dotted keys. Raises BadRecipe naming the key."""
    merged: dict[str, Any] = {}
    if preset:
        _merge(merged, _read(preset_text(preset), where=f"preset {preset}"))
    if file:
        try:
            text = file.read_text()
        except OSError as error:
            raise BadRecipe(f"{file}: {error.strerror}") from error
        _merge(merged, _read(text, where=str(file)))
    for key, value in settings.items():
        _merge(merged, _nested(key, value))
    _check_keys(merged)
    for part in ("adapter", "train", "preference"):
        for key, value in merged.get(part, {}).items():
            if isinstance(value, str) and _EXPONENT.match(value):
                merged[part][key] = float(value)  # YAML 1.1 takes 1e-4 for text, people do not
    try:
        recipe = msgspec.convert(merged, Recipe)
    except msgspec.ValidationError as error:
        raise BadRecipe(f"recipe: {error}") from error
    _check_values(recipe)
    return recipe


def preset_names() -> list[str]:
    """List the presets that the package carries."""
    folder = resources.files("loractl.adapters.training") / "presets"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def preset_text(name: str) -> str:
    """Return a preset's file; raises BadRecipe listing the presets there are."""
    if name not in preset_names():
        raise BadRecipe(f"no preset {name!r}", hint=f"there are: {', '.join(preset_names())}")
    return (resources.files("loractl.adapters.training") / "presets" / f"{name}.yaml").read_text()


def parse_setting(text: str) -> tuple[str, Any]:
    """Read `a.b=c`, the value as YAML reads it."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise BadRecipe(f"--set {text!r} is not KEY=VALUE", hint="for example --set train.epochs=2")
    return key, yaml.safe_load(value)


def first_difference(one: Recipe, other: Recipe) -> str | None:
    """Name the first key whose value differs, with both values; None where the recipes are equal."""
    ours, theirs = _flat(msgspec.to_builtins(one)), _flat(msgspec.to_builtins(other))
    for key, value in ours.items():
        if theirs.get(key) != value:
            return f"{key} is {value!r}, not {theirs.get(key)!r}"
    return None


def flat_settings(recipe: Recipe) -> dict[str, Any]:
    """Return every setting under its dotted key."""
    return _flat(msgspec.to_builtins(recipe))


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """Lay settings with dotted keys over a recipe; raises BadRecipe naming the key."""
    return resolve_recipe(preset=None, file=None, settings=flat_settings(recipe) | dict(settings))


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, Mapping) else {prefix + key: inner}
    return flat


def save_lock(recipe: Recipe, folder: Path) -> None:
    """Write every resolved setting; `loractl train recipe.lock.yaml` repeats the run."""
    (folder / LOCK_FILE).write_text(yaml.safe_dump(msgspec.to_builtins(recipe), sort_keys=False))


def _read(text: str, *, where: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadRecipe(f"{where}: {error}") from error
    if not isinstance(value, dict):
        raise BadRecipe(f"{where}: a recipe is a mapping of keys", hint="see `loractl train --help`")
    return value


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _check_keys(merged: Mapping[str, Any]) -> None:
    parts = {"adapter": AdapterPart, "train": TrainPart, "data": DataPart, "preference": PreferencePart}
    for key, value in merged.items():
        _check_key(key, Recipe.__struct_fields__, prefix="")
        if key in parts:
            if not isinstance(value, Mapping):
                raise BadRecipe(f"{key} must be a mapping of keys, not {value!r}")
            for inner in value:
                _check_key(inner, parts[key].__struct_fields__, prefix=f"{key}.")


def _check_key(key: str, known: Sequence[str], *, prefix: str) -> None:
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(prefix + name for name in known)}"
        raise BadRecipe(f"unknown key {prefix}{key}", hint=hint)


def _check_values(recipe: Recipe) -> None:
    limits = (
        ("adapter.rank", recipe.adapter.rank, 1, 1024),
        ("adapter.dropout", recipe.adapter.dropout, 0, 0.9),
        ("train.epochs", recipe.train.epochs, 0.001, 1000),
        ("train.batch_size", recipe.train.batch_size, 1, 4096),
        ("train.accumulation", recipe.train.accumulation, 1, 4096),
        ("train.learning_rate", 1e-9 if recipe.train.learning_rate == "auto" else recipe.train.learning_rate, 1e-9, 1),
        ("train.lora_plus", 1 if recipe.train.lora_plus is None else recipe.train.lora_plus, 1, 1000),
        ("train.eval_every", recipe.train.eval_every, 0, 1 << 30),
        ("train.patience", recipe.train.patience, 0, 1 << 30),
        ("train.save_every", recipe.train.save_every, 0, 1 << 30),
        ("train.warmup", recipe.train.warmup, 0, 1),
        ("data.max_tokens", 8 if recipe.data.max_tokens == "auto" else recipe.data.max_tokens, 8, 1 << 20),
        ("data.eval_share", recipe.data.eval_share, 0, 0.5),
        ("preference.beta", recipe.preference.beta, 1e-6, 100),
        ("preference.label_smoothing", recipe.preference.label_smoothing, 0, 0.5),
        ("preference.sft_weight", recipe.preference.sft_weight, 0, 100),
    )
    for key, value, low, high in limits:
        if not low <= value <= high:
            raise BadRecipe(f"{key}={value} is outside {low} to {high}")
    if recipe.train.patience and not (recipe.data.eval_share or recipe.data.eval_files):
        raise BadRecipe("train.patience needs held-out rows to judge by", hint="data.eval_share=0.05")
    if recipe.adapter.dora and recipe.adapter.init in {"pissa", "olora"}:
        raise BadRecipe(f"adapter.dora and adapter.init={recipe.adapter.init} cannot be saved together")
    template = recipe.data.template
    if template is not None and not re.search(r"\{\w+\}.*\{\w+\}$", template, re.DOTALL):
        raise BadRecipe(
            f"data.template {template!r} must name two columns and end with the one that is learned",
            hint='for example "Review: {text} Label: {label}"',
        )
