"""Checkpoints: all that a run's next step depends on, in a folder that is whole or not there. Runs nothing.

`RESULT.checkpoint/step-000120/` beside the result's folder holds `tensors.safetensors` and `state.json`. A new one is
written under another name, synced, renamed, and only then are older ones removed: kill -9 at any time leaves one.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from loractl.adapters.digest import file_sha256
from loractl.adapters.errors import BadData, Conflict, NotFound, UsageError
from loractl.adapters.training.data_files import data_files
from loractl.adapters.training.examples import Example
from loractl.adapters.training.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from loractl.adapters.training.distributed import World
    from loractl.adapters.training.member import Member

_SUFFIX = ".checkpoint"
_TENSORS, _STATE = "tensors.safetensors", "state.json"


class Record(msgspec.Struct, kw_only=True):
    """The JSON half of a checkpoint."""

    recipe: Recipe
    base_fingerprint: str
    examples_digest: str
    files_sha256: dict[str, str]
    num_processes: int
    state: dict[str, Any]
    optimizer_scalars: dict[str, dict[str, float]]
    tensors_sha256: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One whole checkpoint on the disk."""

    folder: Path
    record: Record


def checkpoint_folder(out: Path) -> Path:
    """Where the checkpoints of the run that makes `out` are."""
    return out.parent / (out.name + _SUFFIX)


def find_checkpoints(folder: Path) -> list[Checkpoint]:
    """Find the unfinished runs at a result's folder, its checkpoints, or below a folder of several results."""
    candidates = [folder] if folder.name.endswith(_SUFFIX) else [checkpoint_folder(folder)]
    if not candidates[0].is_dir():
        candidates = sorted(folder.glob("*" + _SUFFIX)) if folder.is_dir() else []
    found = [checkpoint for candidate in candidates if (checkpoint := _newest(candidate))]
    if not found:
        finished = (folder / "adapter_config.json").is_file()
        raise NotFound(
            f"{folder}: no checkpoint" + (": this run has finished" if finished else ""),
            hint="give the --out of a run that was interrupted",
        )
    return found


def check_no_unfinished(out: Path) -> None:
    """Raise Conflict where a new run would silently throw away an unfinished one."""
    if (checkpoint := _newest(checkpoint_folder(out))) is not None:
        raise Conflict(
            f"{checkpoint_folder(out)} holds an unfinished run at step {checkpoint.record.state['step']}",
            hint=f"loractl train --resume {out} goes on with it; remove the folder to begin anew",
        )


def save_checkpoint(member: "Member", facts: "Facts", world: "World") -> Path | None:
    """Write the state of a run; every process calls it, the first one writes. Returns the folder there."""
    random_states = {
        f"{name}.{rank}": state
        for name, own in (("rng", member.rng), ("step_rng", member.step_rng))
        for rank, state in enumerate(world.gather(own))
    }
    if not world.is_first:
        return None
    tensors, scalars = _member_tensors(member)
    folder = checkpoint_folder(Path(member.recipe.out))
    staged = folder / f"writing-{os.getpid()}"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    _save_tensors(tensors | random_states, staged / _TENSORS)
    record = Record(
        recipe=_with_whole_paths(member.recipe),
        base_fingerprint=facts.base_fingerprint,
        examples_digest=facts.examples_digest,
        files_sha256=facts.files_sha256,
        num_processes=world.size,
        state=msgspec.to_builtins(member.state),
        optimizer_scalars=scalars,
        tensors_sha256=file_sha256(staged / _TENSORS),
    )
    _write(staged / _STATE, msgspec.json.format(msgspec.json.encode(record)))
    name = f"step-{member.state.step:08d}-{member.state.num_micro:04d}"
    target = folder / name
    if not target.exists():  # else the same state is there already
        staged.rename(target)
    _sync_folder(folder)
    for other in folder.iterdir():
        if other.name != name:
            shutil.rmtree(other)
    return target


def load_checkpoint(checkpoint: Checkpoint, member: "Member", world: "World") -> None:
    """Put a run back where it was; raises BadData where the file is damaged."""
    import torch
    from safetensors.torch import load_file

    from loractl.adapters.training.member import State

    path = checkpoint.folder / _TENSORS
    if file_sha256(path) != checkpoint.record.tensors_sha256:
        raise BadData(f"{path}: damaged: its hash is not the recorded one", hint="begin the run anew")
    tensors = load_file(path)
    member.state = msgspec.convert(checkpoint.record.state, State)
    device = member.trunk.device
    with torch.no_grad():
        for name, parameter in member.parameters:
            parameter.copy_(tensors[f"weight.{name}"])
            if (gradient := tensors.get(f"gradient.{name}")) is not None:
                parameter.grad = gradient.to(device)
        for name, parameter in member.trunk.start(member.name):
            parameter.copy_(tensors[f"start.{name}"])
    member.best = {name: tensors[key].to(device) for name, _ in member.parameters if (key := f"best.{name}") in tensors}
    for name, parameter in member.parameters:
        prefix = f"optimizer.{name}."
        state: dict[str, Any] = dict(checkpoint.record.optimizer_scalars.get(name, {}))
        state |= {
            key.removeprefix(prefix): value.to(device) for key, value in tensors.items() if key.startswith(prefix)
        }
        if state:
            member.optimizer.state[parameter] = state
    member.rng, member.step_rng = tensors[f"rng.{world.rank}"], tensors[f"step_rng.{world.rank}"]


def remove_checkpoints(out: Path) -> None:
    """Remove what a finished run needs no more."""
    shutil.rmtree(checkpoint_folder(out), ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a run was made of; a checkpoint goes on with nothing else."""

    base_fingerprint: str
    examples_digest: str
    files_sha256: dict[str, str]


def gather_facts(recipe: Recipe, *, base_fingerprint: str, examples: Sequence[Sequence[Example]]) -> Facts:
    """Hash the examples in their order, and each data file, so that a change can be named."""
    digest = hashlib.sha256()
    for part in examples:
        for example in (one for row in part for one in row.sequences):
            digest.update(f"{example.ids} {[int(flag) for flag in example.learned]}\n".encode())
        digest.update(b"\n")
    names = [str(path) for name in (*recipe.data.files, *recipe.data.eval_files) for path in data_files(name)]
    files = {name: file_sha256(Path(name)) for name in names}
    return Facts(
        base_fingerprint=base_fingerprint,
        examples_digest=f"sha256:{digest.hexdigest()}",
        files_sha256={str(Path(name).resolve()): value for name, value in files.items()},
    )


def check_unchanged(record: Record, facts: Facts, world: "World") -> None:
    """Raise Conflict or UsageError naming what is not as it was when the checkpoint was written."""
    if facts.base_fingerprint != record.base_fingerprint:
        raise Conflict(
            f"the base changed: {facts.base_fingerprint[:19]} now, {record.base_fingerprint[:19]} at the checkpoint",
            hint="a run goes on with its own base alone; begin anew",
        )
    for name, value in record.files_sha256.items():
        if facts.files_sha256.get(name) != value:
            raise Conflict(
                f"{name} changed since the checkpoint: sha256 {str(facts.files_sha256.get(name))[:12]} now, "
                f"{value[:12]} then",
                hint="put the file back, or begin anew",
            )
    if facts.examples_digest != record.examples_digest:
        raise Conflict(
            "the same settings give other examples than at the checkpoint: data, tokenizer or loractl changed",
            hint="begin the run anew",
        )
    if world.size != record.num_processes:
        raise UsageError(
            f"the checkpoint is of {record.num_processes} processes, and now there are {world.size}",
            hint=f"torchrun --nproc-per-node {record.num_processes} -m loractl.cli train --resume ...",
        )


def _newest(folder: Path) -> Checkpoint | None:
    if not folder.is_dir():
        return None
    for step in sorted(folder.glob("step-*"), reverse=True):
        path = step / _STATE
        if path.is_file():
            try:
                return Checkpoint(step, msgspec.json.decode(path.read_bytes(), type=Record))
            except msgspec.DecodeError as error:
                raise BadData(f"{path}: {error}", hint="another version of loractl wrote it; begin anew") from error
    return None


def _member_tensors(member: "Member") -> tuple[dict[str, "torch.Tensor"], dict[str, dict[str, float]]]:
    import torch

    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, float]] = {}
    for name, parameter in member.parameters:
        tensors[f"weight.{name}"] = parameter.detach()
        if parameter.grad is not None:
            tensors[f"gradient.{name}"] = parameter.grad
        for key, value in member.optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
            else:
                scalars.setdefault(name, {})[key] = value
    for name, parameter in member.trunk.start(member.name):
        tensors[f"start.{name}"] = parameter.detach()
    return tensors | {f"best.{name}": value for name, value in member.best.items()}, scalars


def _save_tensors(tensors: Mapping[str, "torch.Tensor"], path: Path) -> None:
    from safetensors.torch import save

    # Cloned: two parameters that share storage would be refused.
    _write(path, save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}))


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _with_whole_paths(recipe: Recipe) -> Recipe:
    """Name files by whole paths, so that a run can go on from another folder; a checkpoint never travels."""
    settings = msgspec.to_builtins(recipe)

    def whole(name: str) -> str:
        return str(Path(name).resolve()) if Path(name).exists() else name

    settings["base"] = whole(recipe.base)
    settings["out"] = str(Path(recipe.out).resolve())
    for key in ("files", "eval_files"):
        settings["data"][key] = [whole(name) for name in settings["data"][key]]
    if recipe.adapter.start_from:
        settings["adapter"]["start_from"] = whole(recipe.adapter.start_from)
    return msgspec.convert(settings, Recipe)
