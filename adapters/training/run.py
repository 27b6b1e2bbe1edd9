"""One training run from recipe to adapter folder: read, check, load, train, evaluate, save. Knows no terminal."""

import random
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loractl.adapters.base_identity import BaseIdentity, identify_base
from loractl.adapters.base_source import resolve_base
from loractl.adapters.digest import folder_digest
from loractl.adapters.errors import BadRecipe, Incompatible
from loractl.adapters.manifest import BasePin, DataRecord, Manifest
from loractl.adapters.reference import Digest
from loractl.adapters.training.events import Listener, Started
from loractl.adapters.training.examples import Example, prepare_examples
from loractl.adapters.training.recipe import Recipe
from loractl.adapters.training.rows import Row, read_rows, rows_digest

_NUM_PROBES = 8


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything that is known before weights are loaded."""

    folder: Path
    revision: str | None
    identity: BaseIdentity
    rows: list[Row]
    train: list[Example]
    held_out: list[Example]
    num_overlong: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run left behind."""

    folder: Path
    digest: Digest
    manifest: Manifest


def prepare(recipe: Recipe) -> Inputs:
    """Read and check everything but the weights; raises before a single step what would fail later."""
    from loractl.adapters.base_loading import load_tokenizer

    if not recipe.base:
        raise BadRecipe("no base model", hint="--base FOLDER or a hub repo id")
    if not recipe.data.files:
        raise BadRecipe("no data", hint="--data FILE")
    rows = [row for name in recipe.data.files for row in read_rows(Path(name))]
    source = resolve_base(recipe.base)
    tokenizer = load_tokenizer(source.folder)
    prepared = prepare_examples(rows, tokenizer, template=recipe.data.template, max_tokens=recipe.data.max_tokens)
    train, held_out = _split(prepared.examples, share=recipe.data.eval_share, seed=recipe.train.seed)
    identity = identify_base(source.folder, base_id=source.id)
    return Inputs(source.folder, source.revision, identity, rows, train, held_out, prepared.num_overlong)


def run(recipe: Recipe, *, listener: Listener) -> Outcome:
    """Train one adapter and save it; the folder is complete or not there."""
    if not recipe.out:
        raise BadRecipe("no place for the result", hint="--out DIR")
    inputs = prepare(recipe)

    from loractl.adapters.base_loading import load_base_model
    from loractl.adapters.training.expanded import expanded_weights
    from loractl.adapters.training.loop import evaluate, num_steps, run_steps
    from loractl.adapters.training.probes import make_probes
    from loractl.adapters.training.saving import save_adapter

    base = load_base_model(inputs.folder, quantization=recipe.quantize, dtype=recipe.dtype)
    if base.device.type == "cpu":
        # Torch's fused attention takes a fifth more time than plain products here, for short padded rows in bfloat16.
        base.set_attn_implementation("eager")
    model, parent = _attach_adapter(base, recipe, inputs)
    num_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    listener(
        Started(
            num_rows=len(inputs.train),
            num_eval_rows=len(inputs.held_out),
            num_overlong_rows=inputs.num_overlong,
            num_tokens=sum(len(example.ids) for example in inputs.train),
            num_learned_tokens=sum(example.num_learned for example in inputs.train),
            num_parameters=num_parameters,
            num_steps=num_steps(len(inputs.train), recipe.train),
        )
    )
    start = time.perf_counter()
    device = next(model.parameters()).device
    if recipe.quantize == "int8" and device.type == "cpu":
        with expanded_weights(model, dtype=base.dtype):
            curve = run_steps(model, inputs.train, recipe.train, listener=listener)
    else:
        curve = run_steps(model, inputs.train, recipe.train, listener=listener)
    metrics = {"train_seconds": round(time.perf_counter() - start, 3), "train_loss": curve[-1][1]}
    if inputs.held_out:
        metrics["eval_loss"] = round(evaluate(model, inputs.held_out, step=len(curve), listener=listener), 6)
    manifest = _manifest(recipe, inputs, num_parameters=num_parameters, parent=parent)
    manifest.metrics, manifest.loss_curve = metrics, curve
    manifest.targets = sorted(model.peft_config["default"].target_modules)
    manifest.rank = model.peft_config["default"].r
    manifest.probes = make_probes(model, (inputs.held_out or inputs.train)[:_NUM_PROBES])
    folder = save_adapter(model, manifest, recipe, Path(recipe.out))
    return Outcome(folder, folder_digest(folder), manifest)


def _split(examples: list[Example], *, share: float, seed: int) -> tuple[list[Example], list[Example]]:
    num_held_out = round(len(examples) * share)
    if num_held_out == 0:
        return examples, []
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)  # noqa: S311 - a split that can be repeated, not a secret
    chosen = set(order[:num_held_out])
    held_out = [example for index, example in enumerate(examples) if index in chosen]
    return [example for index, example in enumerate(examples) if index not in chosen], held_out


def _attach_adapter(base: Any, recipe: Recipe, inputs: Inputs) -> tuple[Any, Digest | None]:
    import torch

    torch.manual_seed(recipe.train.seed)
    with warnings.catch_warnings():
        # PEFT asks a transformers model by a name that transformers has deprecated.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        return _wrap(base, recipe, inputs)


def _wrap(base: Any, recipe: Recipe, inputs: Inputs) -> tuple[Any, Digest | None]:
    from peft import LoraConfig, PeftModel, get_peft_model

    from loractl.adapters.training.targets import resolve_targets

    part = recipe.adapter
    if part.start_from:
        parent = Path(part.start_from)
        digest = folder_digest(parent)
        _check_parent(parent, inputs.identity)
        model = PeftModel.from_pretrained(base, str(parent), is_trainable=True)
        return model, digest
    config = LoraConfig(
        r=part.rank,
        lora_alpha=part.alpha,  # pyright: ignore[reportArgumentType] - PEFT scales by any number
        lora_dropout=part.dropout,
        target_modules=resolve_targets(base, part.targets),
        use_rslora=part.rslora,
        task_type="CAUSAL_LM",
        revision=inputs.revision,
    )
    return get_peft_model(base, config), None


def _check_parent(folder: Path, identity: BaseIdentity) -> None:
    from loractl.adapters.manifest import load_manifest

    manifest = load_manifest(folder)
    if manifest and manifest.base and manifest.base.fingerprint != identity.fingerprint:
        raise Incompatible(
            f"{folder} was trained on {manifest.base.id} ({manifest.base.fingerprint[:19]}), not on {identity.id}",
            hint="start from an adapter of the same base",
        )


def _manifest(recipe: Recipe, inputs: Inputs, *, num_parameters: int, parent: Digest | None) -> Manifest:
    import datetime
    import importlib.metadata

    import msgspec

    identity = inputs.identity
    settings = msgspec.to_builtins(recipe)
    # The record travels: file and folder names of this machine stay here.
    settings |= {"base": identity.id, "out": Path(recipe.out).name}
    settings["data"]["files"] = [Path(name).name for name in recipe.data.files]
    if recipe.adapter.start_from:
        settings["adapter"]["start_from"] = parent
    return Manifest(
        base=BasePin(
            id=identity.id,
            fingerprint=identity.fingerprint,
            revision=inputs.revision,
            weights_sha256=identity.weights_sha256,
            tokenizer_sha256=identity.tokenizer_sha256,
            chat_template_sha256=identity.chat_template_sha256,
            quantization=recipe.quantize,
            dtype=recipe.dtype,
        ),
        task=inputs.rows[0].form,
        num_trainable_parameters=num_parameters,
        data=DataRecord(
            digest=rows_digest(inputs.rows),
            num_rows=len(inputs.rows),
            num_eval_rows=len(inputs.held_out),
            num_supervised_tokens=sum(example.num_learned for example in inputs.train),
            files=[Path(name).name for name in recipe.data.files],
        ),
        recipe=settings,
        parent=parent,
        loractl_version=importlib.metadata.version("loractl"),
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
