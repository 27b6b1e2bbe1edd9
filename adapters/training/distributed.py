"""The processes that train one adapter together: who they are, and sums over them. Knows no model.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; every process sees the whole order of rows and takes its share.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loractl.adapters.errors import UsageError
from loractl.adapters.training.examples import Example

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class World:
    """One process of `size`; `rank` 0 speaks and saves."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, batch: Sequence[Example]) -> list[Example]:
        """Take this process's rows of a batch: every size-th by length, so that all have as much to do."""
        if self.size == 1:
            return list(batch)
        return sorted(batch, key=lambda example: example.longest)[self.rank :: self.size]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add numbers over the processes."""
        if self.size == 1:
            return list(values)
        import torch

        tensor = torch.tensor(values, dtype=torch.float64)
        self._reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def any(self, flag: bool) -> bool:
        """Tell whether any process says yes."""
        return self.sum([float(flag)])[0] > 0

    def sum_gradients(self, parameters: Iterable["torch.Tensor"]) -> None:
        """Add the gradients of all processes, in one message; a parameter that nobody used keeps none."""
        if self.size == 1:
            return
        import torch

        held = list(parameters)
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in held]
        flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
        self._reduce(flat)
        for parameter, part in zip(held, torch.split(flat, [one.numel() for one in held]), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype).clone()

    def gather(self, tensor: "torch.Tensor") -> list["torch.Tensor"]:
        """Collect a tensor of equal shape from every process."""
        if self.size == 1:
            return [tensor]
        import torch
        import torch.distributed as dist

        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return parts

    def wait(self) -> None:
        """Wait for the others."""
        self.sum([0.0])

    def _reduce(self, tensor: "torch.Tensor") -> None:
        import torch.distributed as dist

        dist.all_reduce(tensor)


def read_world(environment: Mapping[str, str] = os.environ) -> World:
    """Read who this process is; raises UsageError where a launcher's settings were given but no launcher ran."""
    size = int(environment.get("WORLD_SIZE", "1"))
    if size > 1 and "RANK" in environment:
        return World(int(environment["RANK"]), size)
    wanted = [
        f"{name}={environment[name]}"
        for name in ("PET_NNODES", "PET_NPROC_PER_NODE")
        if environment.get(name, "1") not in {"1", "auto", "cpu", "gpu"}
    ]
    if wanted or size > 1:
        given = ", ".join(wanted) or f"WORLD_SIZE={size}"
        raise UsageError(
            f"{given} asks for several processes, but this one was started alone",
            hint="torchrun -m loractl.cli train ... reads these settings and starts them",
        )
    return World()


@contextmanager
def joined(world: World) -> Iterator[None]:
    """Connect the processes for the length of a run; one alone needs nothing."""
    if world.size == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Gloo carries adapter gradients, a few megabytes a step, and works wherever processes see each other.
    dist.init_process_group("gloo", rank=world.rank, world_size=world.size)
    try:
        yield
    finally:
        dist.destroy_process_group()
