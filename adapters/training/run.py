"""One training run from recipe to adapter folder: read, check, load, train, evaluate, save. Knows no terminal."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from loractl.adapters.base_identity import BaseIdentity, base_window, check_same_base, identify_base
from loractl.adapters.base_source import resolve_base
from loractl.adapters.digest import folder_digest
from loractl.adapters.errors import BadData, BadRecipe, LoractlError, UsageError
from loractl.adapters.manifest import DataRecord, Manifest
from loractl.adapters.reference import Digest
from loractl.adapters.training.checkpoint import (
    Checkpoint,
    Facts,
    check_no_unfinished,
    check_unchanged,
    find_checkpoints,
    gather_facts,
    remove_checkpoints,
)
from loractl.adapters.training.data_files import public_name
from loractl.adapters.training.data_summary import DataSummary, summarize
from loractl.adapters.training.distributed import World, joined, read_world
from loractl.adapters.training.events import Listener, Progress, Resumed, Started
from loractl.adapters.training.examples import Example, marked_text, prepare_examples, template_columns
from loractl.adapters.training.interrupt import stop_requests
from loractl.adapters.training.rate import auto_rate
from loractl.adapters.training.recipe import Recipe
from loractl.adapters.training.rows import Row, read_all_rows, rows_digest
from loractl.adapters.training.splitting import split_rows

if TYPE_CHECKING:
    from loractl.adapters.training.member import Member
    from loractl.adapters.training.trunk import Trunk

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
    held_out_digest: str
    summary: DataSummary
    preview: list[tuple[str, bool]]
    """The first row to train on as text, in pieces that are learned or not."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run left behind."""

    folder: Path
    digest: Digest
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Task:
    """One adapter to make: from its beginning, or from where a checkpoint left it."""

    recipe: Recipe
    checkpoint: Checkpoint | None = None


def prepare(recipe: Recipe) -> Inputs:
    """Read and check everything but the weights; raises before a single step what would fail later."""
    from loractl.adapters.base_loading import load_tokenizer

    if not recipe.base:
        raise BadRecipe("no base model", hint="--base FOLDER or a hub repo id")
    if not recipe.data.files:
        raise BadRecipe("no data", hint="--data FILE")
    recipe = resolve_numbers(recipe)
    columns = template_columns(recipe.data.template)
    rows = read_all_rows(recipe.data.files, columns=columns)
    source = resolve_base(recipe.base)
    tokenizer = load_tokenizer(source.folder)
    prepared = prepare_examples(rows, tokenizer, recipe.data, max_tokens=int(recipe.data.max_tokens))
    if recipe.data.eval_files:
        eval_rows = read_all_rows(recipe.data.eval_files, columns=columns)
        if (eval_rows[0].form == "preference") != (rows[0].form == "preference"):
            raise BadData(f"data.eval_files hold {eval_rows[0].form} rows, data.files {rows[0].form} rows")
        aside = prepare_examples(eval_rows, tokenizer, recipe.data, max_tokens=int(recipe.data.max_tokens))
        train, held_out, held_out_rows = prepared.examples, aside.examples, aside.rows
    else:
        numbers, aside_numbers = split_rows(prepared.rows, share=recipe.data.eval_share, seed=recipe.train.seed)
        train, held_out = ([prepared.examples[number] for number in part] for part in (numbers, aside_numbers))
        held_out_rows = [prepared.rows[number] for number in aside_numbers]
    identity = identify_base(source.folder, base_id=source.id)
    if recipe.adapter.start_from:
        _check_parent(Path(recipe.adapter.start_from), identity)
    preview = marked_text(train[0], tokenizer)
    summary = summarize(rows, prepared, train=train, num_eval_rows=len(held_out))
    return Inputs(
        folder=source.folder,
        revision=source.revision,
        identity=identity,
        rows=rows,
        train=train,
        held_out=held_out,
        held_out_digest=rows_digest(held_out_rows),
        summary=summary,
        preview=preview,
    )


def run(recipe: Recipe, *, listener: Listener) -> Outcome:
    """Train one adapter and save it; the folder is complete or not there."""
    (outcome,) = run_fleet([Task(recipe)], listener=lambda _, event: listener(event))
    if isinstance(outcome, LoractlError):
        raise outcome
    return outcome


def tasks_to_resume(folders: Sequence[Path]) -> list[Task]:
    """Find the unfinished runs at these folders; raises NotFound where there is none."""
    return [Task(found.record.recipe, found) for folder in folders for found in find_checkpoints(folder)]


def run_fleet(
    tasks: Sequence[Task], *, listener: Callable[[str, Progress], None], grouped: bool = False
) -> list[Outcome | LoractlError]:
    """Train adapters over one base in one process; an adapter that fails alone is returned as its error.

    Where several processes train together, only the first returns outcomes. Raises Interrupted, the state saved.
    """
    world = read_world()
    if grouped and world.size > 1:
        raise UsageError("--grouped is for one process", hint="without --grouped the members take turns")
    tasks = [Task(resolve_numbers(task.recipe), task.checkpoint) for task in tasks]
    _check_tasks(tasks, fresh_start=world.is_first)
    inputs = [prepare(task.recipe) for task in tasks]
    tasks = [_with_checkpointing(task, one) for task, one in zip(tasks, inputs, strict=True)]
    for task, one in zip(tasks, inputs, strict=True):
        if task.recipe.train.batch_size * task.recipe.train.accumulation < world.size:
            raise UsageError(f"{world.size} processes share fewer rows a step", hint="a larger train.batch_size")
        if task.checkpoint:
            check_unchanged(task.checkpoint.record, _facts(task.recipe, one), world)
    with joined(world), stop_requests() as should_stop:
        return _train(tasks, inputs, world, listener=listener, grouped=grouped, should_stop=should_stop)


def _train(
    tasks: Sequence[Task],
    inputs: Sequence[Inputs],
    world: World,
    *,
    listener: Callable[[str, Progress], None],
    grouped: bool,
    should_stop: Callable[[], bool],
) -> list[Outcome | LoractlError]:
    from loractl.adapters.base_loading import load_base_model, quiet_libraries

    quiet_libraries()  # before PEFT imports what speaks
    from loractl.adapters.training.checkpoint import load_checkpoint
    from loractl.adapters.training.fleet import Fleet
    from loractl.adapters.training.grouped import check_groupable
    from loractl.adapters.training.trunk import Trunk

    recipe = tasks[0].recipe
    trunk = Trunk(load_base_model(inputs[0].folder, quantization=recipe.quantize, dtype=recipe.dtype))
    names = ["default"] if len(tasks) == 1 else [f"member{number}" for number in range(len(tasks))]
    states = [
        trunk.attach(name, task.recipe, revision=one.revision, examples=one.train, fresh=task.checkpoint is None)
        for name, task, one in zip(names, tasks, inputs, strict=True)
    ]
    trunk.ready(quantize=recipe.quantize, expand_int8=recipe.train.expand_int8 is not False)
    members: list[Member] = []
    for name, task, one, rng in zip(names, tasks, inputs, states, strict=True):
        tell = partial(listener, Path(task.recipe.out).name) if world.is_first else _tell_nobody
        member = _member(name, task, one, trunk=trunk, rng=rng, world=world, listener=tell)
        if task.checkpoint:
            load_checkpoint(task.checkpoint, member, world)
            tell(Resumed(step=member.state.step, folder=str(task.checkpoint.folder.parent)))
        members.append(member)
    if grouped:
        check_groupable(members)
    done: dict[str, Outcome | LoractlError] = {}

    def finish(member: "Member") -> None:
        index = names.index(member.name)
        if world.is_first:
            done[member.name] = _save(member, tasks[index], inputs[index])
        trunk.remove(member.name)

    facts = {name: _facts(task.recipe, one) for name, task, one in zip(names, tasks, inputs, strict=True)}
    fleet = Fleet(members, facts, world, finish, grouped)
    fleet.train(should_stop)
    done |= fleet.failures
    return [done[name] for name in names if name in done]


def _member(
    name: str, task: Task, inputs: Inputs, *, trunk: "Trunk", rng: Any, world: World, listener: Listener
) -> "Member":
    from loractl.adapters.training.member import Member

    member = Member(
        name,
        task.recipe,
        trunk=trunk,
        train=inputs.train,
        held_out=inputs.held_out,
        rng=rng,
        world=world,
        listener=listener,
    )
    listener(
        Started(
            data=inputs.summary,
            preview=inputs.preview,
            num_parameters=sum(parameter.numel() for parameter in member.tensors),
            num_steps=member.num_steps,
            num_processes=world.size,
        )
    )
    return member


def _save(member: "Member", task: Task, inputs: Inputs) -> Outcome:
    """Write the finished adapter with its record, and remove the checkpoints that it no longer needs."""
    from loractl.adapters.training.curve import loss_svg
    from loractl.adapters.training.member import member_facts
    from loractl.adapters.training.probes import make_probes
    from loractl.adapters.training.saving import save_adapter

    recipe, trunk = task.recipe, member.trunk
    member.use_best()
    parent = folder_digest(Path(recipe.adapter.start_from)) if recipe.adapter.start_from else None
    num_parameters = sum(parameter.numel() for parameter in member.tensors)
    manifest = _manifest(recipe, inputs, num_parameters=num_parameters, parent=parent)
    manifest.metrics, manifest.loss_curve = member_facts(member), member.state.curve
    manifest.measured_on = {name: inputs.held_out_digest for name in manifest.metrics if name.startswith("eval_")}
    config = trunk.model.peft_config[member.name]
    start = dict(trunk.start(member.name))
    manifest.targets = sorted(config.target_modules)
    manifest.rank = config.r * (2 if start else 1)
    with trunk.as_served(member.name):
        manifest.probes = make_probes(trunk.model, (inputs.held_out or inputs.train)[:_NUM_PROBES])
    folder = save_adapter(
        trunk.model,
        manifest,
        recipe,
        Path(recipe.out),
        name=member.name,
        start=start,
        extra_files={"loss.svg": loss_svg(member.state.curve, member.state.evals, title=Path(recipe.out).name)},
    )
    remove_checkpoints(Path(recipe.out))
    return Outcome(folder, folder_digest(folder), manifest)


def _facts(recipe: Recipe, inputs: Inputs) -> Facts:
    return gather_facts(recipe, base_fingerprint=inputs.identity.fingerprint, examples=[inputs.train, inputs.held_out])


def _tell_nobody(event: Progress) -> None:
    """Only the first of several processes speaks."""
    del event


def _with_checkpointing(task: Task, inputs: Inputs) -> Task:
    """Decide by the memory there is whether activations are kept, where the recipe leaves it open."""
    if task.recipe.train.checkpoint_activations is not None:
        return task
    import torch

    from loractl.adapters.training.memory import fit_run, make_ledger, run_micro_batches

    device = "cuda" if torch.cuda.is_available() else "cpu"
    micros = run_micro_batches(inputs.train, task.recipe)
    ledger, _ = make_ledger(task.recipe, inputs.folder, micros, device=device)
    decided = fit_run(task.recipe, ledger, device=device).recompute
    train = msgspec.structs.replace(task.recipe.train, checkpoint_activations=decided)
    return Task(msgspec.structs.replace(task.recipe, train=train), task.checkpoint)


def resolve_numbers(recipe: Recipe) -> Recipe:
    """Replace what a recipe leaves to the base by its value, which the lock then holds."""
    if not recipe.base:
        return recipe
    train, data = recipe.train, recipe.data
    if train.learning_rate == "auto" or data.max_tokens == "auto":
        config = json.loads((resolve_base(recipe.base).folder / "config.json").read_text())
        if train.learning_rate == "auto":
            rate = auto_rate(int(config["hidden_size"]), model_type=str(config.get("model_type", "")))
            train = msgspec.structs.replace(train, learning_rate=rate)
        if data.max_tokens == "auto":
            data = msgspec.structs.replace(data, max_tokens=base_window(config))
    return msgspec.structs.replace(recipe, train=train, data=data)


def _check_tasks(tasks: Sequence[Task], *, fresh_start: bool) -> None:
    first = tasks[0].recipe
    places: set[Path] = set()
    for task in tasks:
        recipe = task.recipe
        if not recipe.out:
            raise BadRecipe("no place for the result", hint="--out DIR")
        for key in ("base", "quantize", "dtype"):
            if getattr(recipe, key) != getattr(first, key):
                raise BadRecipe(
                    f"{recipe.out}: {key} is {getattr(recipe, key)!r}, but {first.out} has {getattr(first, key)!r}",
                    hint="a fleet trains over one base, held in one way",
                )
        place = Path(recipe.out).resolve()
        if place in places:
            raise BadRecipe(f"two recipes of the fleet write to {recipe.out}", hint="give each its own out")
        places.add(place)
        if fresh_start and task.checkpoint is None:
            check_no_unfinished(Path(recipe.out))


def _check_parent(folder: Path, identity: BaseIdentity) -> None:
    from loractl.adapters.manifest import load_manifest

    manifest = load_manifest(folder)
    check_same_base(manifest.base if manifest else None, identity, adapter=folder)


def _manifest(recipe: Recipe, inputs: Inputs, *, num_parameters: int, parent: Digest | None) -> Manifest:
    import datetime
    import importlib.metadata

    identity = inputs.identity
    settings = msgspec.to_builtins(recipe)
    # The record travels: file and folder names of this machine stay here.
    settings |= {"base": identity.id, "out": Path(recipe.out).name}
    for key in ("files", "eval_files"):
        settings["data"][key] = [public_name(name) for name in settings["data"][key]]
    if recipe.adapter.start_from:
        settings["adapter"]["start_from"] = parent
    return Manifest(
        base=inputs.identity.pin(revision=inputs.revision, quantization=recipe.quantize, dtype=recipe.dtype),
        task=inputs.rows[0].form,
        num_trainable_parameters=num_parameters,
        data=DataRecord(
            digest=rows_digest(inputs.rows),
            num_rows=len(inputs.rows),
            num_eval_rows=len(inputs.held_out),
            num_supervised_tokens=sum(example.num_learned for example in inputs.train),
            files=[public_name(name) for name in recipe.data.files],
        ),
        recipe=settings,
        parent=parent,
        loractl_version=importlib.metadata.version("loractl"),
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
