"""Trains many adapters over one frozen base in one process, a step of each in turn; one adapter is a fleet of one.

A member's numbers never depend on the others: rows, optimizer, schedule and random numbers are its own, and its steps
are the ones that it would do alone. Knows no files but through the checkpoint module.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loractl.adapters.errors import Diverged, Interrupted, LoractlError
from loractl.adapters.training.checkpoint import Facts, save_checkpoint
from loractl.adapters.training.distributed import World
from loractl.adapters.training.events import Saved, Stopped
from loractl.adapters.training.grouped import grouped_step
from loractl.adapters.training.member import Member

_SAVE_EVERY_S = 600.0


@dataclass(slots=True)
class Fleet:
    """Members that still train, and what became of the others."""

    members: list[Member]
    facts: dict[str, Facts]
    world: World
    finish: Callable[[Member], None]
    """Called once for each member that reached its end."""
    grouped: bool = False
    failures: dict[str, LoractlError] = field(default_factory=dict)
    _saved_at: float = field(default_factory=time.monotonic)

    def train(self, should_stop: Callable[[], bool]) -> None:
        """Train every member to its end; raises Interrupted after saving all that are unfinished."""
        live = list(self.members)
        self._retire(live)  # a checkpoint may be of a run that only lacked its result
        while live:
            if self.grouped and len(live) > 1:
                self._grouped_round(live, should_stop)
            else:
                for member in list(live):
                    self._turn(member, live, should_stop)
            self._retire(live)
            self._save_due(live)

    def _turn(self, member: Member, live: list[Member], should_stop: Callable[[], bool]) -> None:
        self._stop_if_asked(live, should_stop)
        try:
            if not member.step(should_stop):
                self._stop_if_asked(live, should_stop)
        except Diverged as error:
            self._fail(member, live, error)

    def _grouped_round(self, live: list[Member], should_stop: Callable[[], bool]) -> None:
        self._stop_if_asked(live, should_stop)
        for member, error in grouped_step(live):
            self._fail(member, live, error)

    def _stop_if_asked(self, live: Sequence[Member], should_stop: Callable[[], bool]) -> None:
        if not self.world.any(should_stop()):
            return
        started = time.monotonic()
        for member in live:
            self._save(member)
        places = " ".join(f"--resume {Path(member.recipe.out)}" for member in live)
        steps = ", ".join(f"{member.state.step} of {member.num_steps}" for member in live)
        raise Interrupted(
            f"stopped after step {steps}; checkpoint saved in {time.monotonic() - started:.1f} s",
            hint=f"loractl train {places}",
        )

    def _retire(self, live: list[Member]) -> None:
        for member in [one for one in live if one.state.finished]:
            live.remove(member)
            self.finish(member)

    def _fail(self, member: Member, live: list[Member], error: LoractlError) -> None:
        live.remove(member)
        member.optimizer.zero_grad(set_to_none=True)
        self.failures[member.name] = error
        member.listener(Stopped(step=member.state.step, reason=error.message, failed=True))

    def _save_due(self, live: Sequence[Member]) -> None:
        by_clock = self.world.any(self.world.is_first and time.monotonic() - self._saved_at >= _SAVE_EVERY_S)
        if by_clock:
            self._saved_at = time.monotonic()
        for member in live:
            every = member.recipe.train.save_every
            if (by_clock and not every) or (every and member.state.step % every == 0):
                self._save(member)

    def _save(self, member: Member) -> None:
        folder = save_checkpoint(member, self.facts[member.name], self.world)
        if folder is not None:
            member.listener(Saved(step=member.state.step, folder=str(folder.parent)))
