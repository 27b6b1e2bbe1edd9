"""Launches a step before the host has read the tokens of the one before. Knows sequences, parts and rows; ends none.

A step flies when the device chooses all its tokens by itself. The next one takes them where they lie, so that the card
computes while the host reads, shows and books them. A sequence that turns out to have ended has one row in vain in the
step that follows: nobody reads its token, and what it wrote lies in blocks that only later steps, which run after it,
give to others.
"""

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass

from loractl.server.engine.containment import attempt
from loractl.server.engine.messages import Event
from loractl.server.engine.next_tokens import NextTokens
from loractl.server.engine.row_choice import Picks
from loractl.server.engine.runner import Part, Runner
from loractl.server.engine.scheduler import Scheduler
from loractl.server.engine.sequence import Sequence
from loractl.server.engine.slots import AdapterSlots

_UNREAD = 0
"""Stands for a token that only the device knows."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A launched step: sequences, how many of their tokens it computes, and what it chooses for them."""

    rows: Items[tuple[Sequence, int]]
    picks: Picks
    since: float


@dataclass(frozen=True, slots=True)
class Landed:
    """What a step brought for one sequence that still ran when it was read; `since` is when the step's turn began."""

    sequence: Sequence
    num_tokens: int
    news: list[Event]


class RunAhead:
    """The step whose tokens are unread, if one flies."""

    def __init__(
        self, *, scheduler: Scheduler, runner: Runner, slots: AdapterSlots, next_tokens: NextTokens, is_on: bool
    ) -> None:
        self._scheduler, self._runner, self._slots, self._next_tokens = scheduler, runner, slots, next_tokens
        self._is_on = is_on
        self._flight: Flight | None = None
        self.num_ahead = 0
        """Steps that were launched before the tokens of the one before were read."""

    @property
    def is_flying(self) -> bool:
        return self._flight is not None

    def may_fly(self, rows: Items[tuple[Sequence, int]]) -> bool:
        """Whether a step over these may be left unread: the device chooses all its tokens, and one sequence goes on."""
        return (
            self._is_on
            and all(self._next_tokens.is_left_to_device(sequence, num_tokens) for sequence, num_tokens in rows)
            and not all(self._next_tokens.is_last(sequence) for sequence, _ in rows)
        )

    def take_off(self, rows: Items[tuple[Sequence, int]], picks: Picks) -> None:
        """Leave a step that was just launched unread."""
        self._flight = Flight(rows, picks, time.monotonic())

    def next(self) -> tuple[list[Landed], float]:
        """Launch the step after the one that flies, if it may be; then read the one that flies. Also returns the
        seconds that it took."""
        flight = self._flight
        if flight is None:
            raise RuntimeError("no step flies")
        self._flight = self._follow(flight)
        found = flight.picks.read()
        now = time.monotonic()
        if self._flight is not None:
            self._flight = Flight(self._flight.rows, self._flight.picks, now)  # it has waited for its turn until here
        running = set(self._scheduler.running)
        landed = [
            Landed(sequence, num_tokens, self._next_tokens.land(sequence, token, is_finite=is_finite))
            for (sequence, num_tokens), token, is_finite in zip(flight.rows, *found, strict=True)
            if sequence in running
        ]
        return landed, now - flight.since

    def drop(self) -> None:
        """Forget what flies."""
        self._flight = None

    def _follow(self, flight: Flight) -> Flight | None:
        """Launch the next tokens of the same sequences; None where others are due, or room has to be made first."""
        running = set(self._scheduler.running)
        if running - {sequence for sequence, _ in flight.rows}:
            return None
        going_on = [
            (row, sequence)
            for row, (sequence, _) in enumerate(flight.rows)
            if sequence in running and not self._next_tokens.is_last(sequence)
        ]
        rows = [(sequence, 1) for _, sequence in going_on]
        if not rows or not self._scheduler.make_room_ahead([sequence for sequence, _ in rows]):
            return None
        parts = [
            Part(
                tokens=[_UNREAD],
                length=len(sequence.tokens) + 1,
                blocks=sequence.blocks,
                slots=self._slots.places(sequence.adapter_key),
                num_logits=1,
                source=row,
            )
            for row, sequence in going_on
        ]

        def launch() -> Picks:
            logits = self._runner.run(parts, flight.picks.tokens)
            return self._next_tokens.pick_ahead([sequence for sequence, _ in rows], logits)

        # What breaks it comes again in the step that is planned when all is read, and is traced to its request there.
        picks = attempt(launch)
        if isinstance(picks, Exception):
            return None
        self.num_ahead += 1
        return Flight(rows, picks, time.monotonic())
