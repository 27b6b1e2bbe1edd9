"""The engine's public face: requests in, events out, one step at a time. Knows nothing of HTTP, JSON and names."""

import dataclasses
import logging
import threading
import time
from collections.abc import Mapping
from collections.abc import Sequence as Items
from pathlib import Path

import torch
from torch import Tensor

from loractl.adapters.base_identity import check_same_base
from loractl.adapters.errors import EngineFailure, Overloaded
from loractl.adapters.manifest import load_manifest
from loractl.adapters.reference import Digest
from loractl.server.engine.accounts import Totals, snapshot
from loractl.server.engine.base_model import BaseModel
from loractl.server.engine.commands import Commands
from loractl.server.engine.constraint import Grammars
from loractl.server.engine.containment import run_contained
from loractl.server.engine.kv_cache import BlockPool
from loractl.server.engine.limits import check_request
from loractl.server.engine.messages import (
    AdapterUse,
    Cancel,
    Constraint,
    Event,
    Failed,
    Submit,
    Token,
)
from loractl.server.engine.next_tokens import NextTokens
from loractl.server.engine.quarantine import Quarantine
from loractl.server.engine.run_ahead import Landed, RunAhead
from loractl.server.engine.runner import Part, Runner
from loractl.server.engine.scheduler import Scheduler
from loractl.server.engine.sequence import Sequence
from loractl.server.engine.settings import EngineSettings
from loractl.server.engine.sizing import EngineSize, choose_size, describe
from loractl.server.engine.slots import AdapterSlots
from loractl.server.engine.stats import EngineStats, StepRecord, StepResult

log = logging.getLogger("loractl.server.engine")

_LOAD_GRACE = 0.2
"""Share of a step that the next one waits for an adapter being read: who misses it by little waits a whole step."""

_MAX_BROKEN_STEPS = 3
"""Steps in a row of which nothing could be computed: then the engine is asked whether it is sound."""


class Engine:
    """Continuous batching of many adapters on one base.

    `step`, `check_books` and `close` belong to one thread, the engine's; everything else may be called from any
    thread and never waits for a step.
    """

    def __init__(self, base: BaseModel, settings: EngineSettings, *, size: EngineSize | None = None) -> None:
        self.base = base
        self.settings = settings
        self.size = size or choose_size(base, settings)
        log.info("%s", describe(self.size, settings))
        self._runner = Runner(
            base,
            num_blocks=self.size.num_blocks,
            block_size=settings.block_size,
            max_rows=settings.max_running,
            num_slots=self.size.num_slots,
        )
        self._slots = AdapterSlots(
            self._runner.layers,
            sides=self._runner.sides,
            num_slots=self.size.num_slots,
            max_rank=settings.max_rank,
            truncate_rank=settings.truncate_rank,
            dtype=self._runner.dtype,
            device=self._runner.device,
            host_cache_bytes=self.size.host_cache_bytes,
            num_loaders=settings.num_loaders,
        )
        self._runner.record()
        self._blocks = BlockPool(self.size.num_blocks)
        self._scheduler = Scheduler(settings, blocks=self._blocks, slots=self._slots)
        self._grammars = Grammars(base.tokenizer, vocab_size=base.vocab_size, eos_token_ids=base.eos_token_ids)
        run_ahead = self._runner.on_card if settings.run_ahead is None else settings.run_ahead
        self._next_tokens = NextTokens(
            base, max_model_len=self.max_model_len, on_device=self._runner.on_card or run_ahead
        )
        self._ahead = RunAhead(
            scheduler=self._scheduler,
            runner=self._runner,
            slots=self._slots,
            next_tokens=self._next_tokens,
            is_on=run_ahead,
        )
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._commands = Commands()
        self._num_queued = 0
        self._num_broken_steps = 0
        self._quarantine = Quarantine()
        self._totals = Totals()
        self._step_started_at: float | None = None
        self._last_step_s = 0.0
        self._stats = self._snapshot()

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens, prompt and output together."""
        return min(self.base.max_model_len, self.settings.max_model_len or self.base.max_model_len)

    def submit(self, request: Submit) -> None:
        """Queue a request; raises Overloaded when the queue is full, BadRequest for what can never run."""
        check_request(
            request,
            max_model_len=self.max_model_len,
            vocab_size=self.base.vocab_size,
            max_adapters=self._scheduler.distinct_bound,
        )
        constraint = request.sampling.constraint
        gate = None if constraint is None else self._grammars.gate(constraint)
        with self._work:
            self._quarantine.check(request)
            if self._num_queued >= self.settings.max_queue + self.settings.max_running:
                raise Overloaded("the queue is full", retry_after_s=1.0)
            self._num_queued += 1
            self._commands.submits.append((request, gate))
            self._work.notify()

    def check_constraint(self, constraint: Constraint) -> None:
        """Compile what an output is to be held to, ahead of `submit`; raises BadRequest for what cannot be served.

        Takes milliseconds, and up to a second at an engine's first.
        """
        self._grammars.gate(constraint)

    def cancel(self, request: Cancel) -> None:
        """End a request at the next step; unknown and ended ids are ignored."""
        with self._work:
            self._commands.cancels.append(request.id)
            self._work.notify()

    def wait_for_work(self, timeout_s: float) -> bool:
        """Wait until `step` has something to do; False after `timeout_s` seconds without."""
        with self._work:
            return self._work.wait_for(
                lambda: bool(self._num_queued) or self._commands.has_any or self._ahead.is_flying, timeout_s
            )

    def step(self) -> StepResult:
        """Run one forward pass over what is due, and return what came of it.

        Waits for a load no longer than a fifth of a step. Where passes run ahead, what came of one may be returned by
        the next call, which first launches another.
        """
        start = self._step_started_at = time.monotonic()
        events = self._take_commands()
        events += self._admit(start)
        unread, grace_s = self._scheduler.unread, _LOAD_GRACE * self._last_step_s
        may_wait = bool(self._scheduler.running) and not self._ahead.is_flying
        if unread and may_wait and self._slots.await_read(unread, grace_s):
            events += self._admit(start)
        record: StepRecord | None = None
        if self._ahead.is_flying:
            landed, seconds = self._ahead.next()
            events += self._land(landed)
            if landed:  # else it was computed in vain: all its requests had ended
                record = self._totals.book([(each.sequence, each.num_tokens) for each in landed], seconds=seconds)
        elif chosen := self._scheduler.plan():
            events += self._run(chosen)
            if not self._ahead.is_flying:
                self._last_step_s = time.monotonic() - start
                record = self._totals.book(chosen, seconds=self._last_step_s)
        elif self._scheduler.waiting and not events:
            time.sleep(0.001)  # only loads are awaited; their threads need the processor
        self._finish_step()
        return StepResult(events=events, record=record, loads=self._slots.times.take())

    def device_memory(self) -> Mapping[str, int]:
        """Bytes on the device by what for: weights, kv, adapters; on a card also activations and reserved."""
        held = {
            "weights": sum(self.base.memory_bytes.values()),
            "kv": self._runner.kv_bytes,
            "adapters": self._slots.slab_bytes,
        }
        if self._runner.device.type == "cuda":
            # What PyTorch has handed out beyond the three is the steps' own; graphs' pools are in it too.
            allocated = int(torch.cuda.memory_allocated(self._runner.device))
            held["activations"] = max(0, allocated - sum(held.values()))
            held["reserved"] = int(torch.cuda.memory_reserved(self._runner.device))
        return held

    def stats(self) -> EngineStats:
        """A snapshot of queues, slots, tiers and counters."""
        return dataclasses.replace(self._stats, step_started_at=self._step_started_at)

    def resolve_adapter(self, folder: Path) -> None:
        """Check that this engine can serve the adapter in `folder`; raises Incompatible or AdapterInvalid with why."""
        manifest = load_manifest(folder)
        check_same_base(manifest.base if manifest else None, self.base.identity, adapter="the adapter")
        self._slots.check_servable(folder)

    def prefetch(self, use: AdapterUse) -> None:
        """Begin to bring an adapter near, ahead of the request that will need it."""
        with self._work:
            self._commands.uses.append(use)
            self._work.notify()

    def pin(self, digest: Digest) -> None:
        """Keep an adapter in its slot; raises NotFound if it is not resident, WillNotFit if no slot may be pinned."""
        with self._lock:
            self._slots.pin(digest)

    def unpin(self, digest: Digest) -> None:
        """Let an adapter be evicted again."""
        with self._lock:
            self._slots.unpin(digest)

    def unload(self, digest: Digest) -> None:
        """Forget an adapter on every tier as soon as no request runs with it."""
        with self._work:
            self._commands.unloads.append(digest)
            self._work.notify()

    def check_books(self) -> None:
        """Raise BooksError unless every block and slot is accounted for."""
        blocks, digests = self._scheduler.held()
        self._blocks.check(blocks)
        self._slots.check(digests)

    def close(self) -> None:
        """Stop the loaders and let go of slots and KV; the base stays, requests that are left are forgotten."""
        self._ahead.drop()
        self._slots.close()
        self._runner.close()

    def _admit(self, now: float) -> list[Event]:
        """Start what can start, and end what never can."""
        events: list[Event] = []
        for sequence, error in self._scheduler.admit(now):
            self._forget(sequence)
            events.append(Failed(id=sequence.id, error=error))
        return events

    def _take_commands(self) -> list[Event]:
        with self._lock:
            commands, self._commands = self._commands, Commands()
        for use in commands.uses:
            self._slots.want(use.digest, use.folder)
        for submit, gate in commands.submits:
            self._scheduler.add(self._next_tokens.begin(submit, gate))
        cancelled = (self._scheduler.find(request_id) for request_id in dict.fromkeys(commands.cancels))
        events: list[Event] = [self._settle(found, found.finished("cancelled")) for found in cancelled if found]
        for digest in commands.unloads:
            self._slots.unload(digest)
        return events

    def _run(self, chosen: list[tuple[Sequence, int]]) -> list[Event]:
        """Compute the chosen tokens; an error ends the request that causes it and no other."""
        parts = [
            Part(
                tokens=sequence.tokens[sequence.num_computed : sequence.num_computed + num_tokens],
                length=sequence.num_computed + num_tokens,
                blocks=sequence.blocks,
                slots=self._slots.places(sequence.adapter_key),
                num_logits=_num_logits(sequence, num_tokens),
            )
            for sequence, num_tokens in chosen
        ]
        wants_hidden = any(sequence.submit.wants_embedding for sequence, _ in chosen)

        def compute(some: Items[Part]) -> tuple[Tensor, Tensor | None]:
            try:
                return self._runner.run_with_hidden(some) if wants_hidden else (self._runner.run(some), None)
            except (MemoryError, torch.OutOfMemoryError):
                self._totals.num_out_of_memory += 1
                raise

        contained = run_contained(compute, parts)
        self._num_broken_steps = 0 if contained.runs else self._num_broken_steps + 1
        if self._num_broken_steps >= _MAX_BROKEN_STEPS and contained.broken:
            self._prove_sound()
        events = [
            self._settle(chosen[place][0], _broken(chosen[place][0], error))
            for place, error in contained.broken.items()
        ]
        for places, (logits, hidden) in contained.runs:
            rows = [(*chosen[place], parts[place].num_logits) for place in places]
            picks = self._next_tokens.pick(rows, logits)
            if picks is not None and len(places) == len(chosen) and self._ahead.may_fly(chosen):
                self._ahead.take_off(chosen, picks)
                continue
            taken = self._next_tokens.take(rows, logits, hidden, picks)
            events += self._land([Landed(row[0], row[1], news) for row, news in zip(rows, taken, strict=True)])
        return events

    def _land(self, landed: Items[Landed]) -> list[Event]:
        """Book what was computed, and settle what came of it."""
        events: list[Event] = []
        for each in landed:
            self._scheduler.computed(each.sequence, each.num_tokens)
            self._totals.num_nonfinite += sum(_is_broken(event) for event in each.news)
            events += [self._settle(each.sequence, event) for event in each.news]
        return events

    def _prove_sound(self) -> None:
        """Compute one token of the bare base; what that raises is no request's fault, and the supervisor's to mend."""
        if self._blocks.num_free:
            blocks = self._blocks.take(1)
            try:
                self._runner.run([Part(tokens=[0], length=1, blocks=blocks, slots=(), num_logits=1)])
            finally:
                self._blocks.give_back(blocks)
        self._num_broken_steps = 0

    def _settle(self, sequence: Sequence, event: Event) -> Event:
        """Take a sequence out of the books if this is its last event; a failed step's is kept from doing it again."""
        if isinstance(event, Token):
            return event
        if _is_broken(event):
            self._totals.num_contained_failures += 1
            with self._lock:
                self._quarantine.note(sequence.submit)
            self._scheduler.distrust(sequence)
        self._scheduler.remove(sequence)
        self._forget(sequence)
        return event

    def _forget(self, sequence: Sequence) -> None:
        self._next_tokens.forget(sequence)
        with self._lock:
            self._num_queued -= 1

    def _finish_step(self) -> None:
        self._step_started_at = None
        self._totals.num_generated_tokens = self._next_tokens.num_chosen
        self._stats = self._snapshot()

    def _snapshot(self) -> EngineStats:
        with self._lock:
            num_quarantined = self._quarantine.num_refused
        return snapshot(
            self.settings,
            scheduler=self._scheduler,
            blocks=self._blocks,
            slots=self._slots,
            totals=self._totals,
            num_quarantined_requests=num_quarantined,
        )


def _is_broken(event: Event) -> bool:
    return isinstance(event, Failed) and isinstance(event.error, EngineFailure)


def _broken(sequence: Sequence, error: Exception) -> Failed:
    hint = "ask again; the server's log has more"
    failure = EngineFailure(f"a step failed: {type(error).__name__}", hint=hint)
    return Failed(id=sequence.id, error=failure)


def _num_logits(sequence: Sequence, num_tokens: int) -> int:
    """Rows whose logits somebody reads: the last one before a choice, or all while the prompt's are asked for."""
    if sequence.wants_prompt_logprobs:
        return num_tokens
    return int(num_tokens == sequence.num_pending)
