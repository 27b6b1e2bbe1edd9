"""The engine's public face: requests in, events out, one step at a time. Knows nothing of HTTP, JSON and names."""

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from loractl.adapters.errors import BaseMismatch, EngineFailure, Overloaded, WillNotFit
from loractl.adapters.manifest import load_manifest
from loractl.adapters.reference import Digest
from loractl.server.engine.base_model import BaseModel
from loractl.server.engine.constraint import Grammars, TokenGate
from loractl.server.engine.containment import run_contained
from loractl.server.engine.kernels.scan import scan_rows
from loractl.server.engine.kv_cache import BlockPool
from loractl.server.engine.limits import check_request, choose_num_blocks
from loractl.server.engine.messages import (
    AdapterUse,
    Cancel,
    Constraint,
    Event,
    Failed,
    Finished,
    FinishReason,
    RequestId,
    Submit,
    Token,
)
from loractl.server.engine.quarantine import Quarantine
from loractl.server.engine.row_choice import Draw, choose_rows
from loractl.server.engine.runner import Part, Runner
from loractl.server.engine.sampler import RowSampler, prompt_logprobs
from loractl.server.engine.scheduler import Scheduler
from loractl.server.engine.sequence import Sequence
from loractl.server.engine.settings import EngineSettings
from loractl.server.engine.slots import AdapterSlots
from loractl.server.engine.stats import EngineCounters, EngineStats, StepRecord, StepResult
from loractl.server.engine.text import TextStream

_MAX_BROKEN_STEPS = 3
"""Steps in a row of which nothing could be computed: then the engine is asked whether it is sound."""


@dataclass(slots=True)
class _Commands:
    """What other threads have asked since the last step."""

    submits: deque[tuple[Submit, TokenGate | None]] = field(default_factory=deque[tuple[Submit, TokenGate | None]])
    cancels: deque[RequestId] = field(default_factory=deque[RequestId])
    uses: deque[AdapterUse] = field(default_factory=deque[AdapterUse])
    unloads: deque[Digest] = field(default_factory=deque[Digest])

    @property
    def has_any(self) -> bool:
        return bool(self.submits or self.cancels or self.uses or self.unloads)


class Engine:
    """Continuous batching of many adapters on one base.

    `step`, `check_books` and `close` belong to one thread, the engine's; everything else may be called from any
    thread and never waits for a step.
    """

    def __init__(self, base: BaseModel, settings: EngineSettings) -> None:
        self.base = base
        self.settings = settings
        num_blocks = choose_num_blocks(base, settings)
        self._runner = Runner(
            base,
            num_blocks=num_blocks,
            block_size=settings.block_size,
            max_rows=settings.max_running,
            num_slots=settings.num_slots,
        )
        self._slots = AdapterSlots(
            self._runner.layers,
            sides=self._runner.sides,
            num_slots=settings.num_slots,
            max_rank=settings.max_rank,
            truncate_rank=settings.truncate_rank,
            dtype=self._runner.dtype,
            device=self._runner.device,
            host_cache_bytes=settings.host_cache_bytes,
            num_loaders=settings.num_loaders,
        )
        self._runner.record()
        self._blocks = BlockPool(num_blocks)
        self._scheduler = Scheduler(settings, blocks=self._blocks, slots=self._slots)
        self._grammars = Grammars(base.tokenizer, vocab_size=base.vocab_size, eos_token_ids=base.eos_token_ids)
        self._samplers: dict[RequestId, RowSampler] = {}
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._commands = _Commands()
        self._num_queued = 0
        self._num_broken_steps = 0
        self._quarantine = Quarantine()
        self._totals = dict.fromkeys(("prompt", "generated", "cached", "steps", "contained", "most_adapters"), 0)
        self._step_started_at: float | None = None
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
            max_adapters=self.settings.distinct_bound,
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
            return self._work.wait_for(lambda: bool(self._num_queued) or self._commands.has_any, timeout_s)

    def step(self) -> StepResult:
        """Run one forward pass over what is due, and return what came of it. Never waits for a load."""
        start = self._step_started_at = time.monotonic()
        events = self._take_commands()
        for sequence, error in self._scheduler.admit(start):
            events.append(self._end(sequence, Failed(id=sequence.id, error=error), is_removed=True))
        chosen = self._scheduler.plan()
        if not chosen:
            self._finish_step()
            if self._scheduler.waiting and not events:
                time.sleep(0.001)  # only loads are awaited; their threads need the processor
            return StepResult(events=events, record=None)
        events += self._run(chosen)
        record = self._record(chosen, start)
        self._finish_step()
        return StepResult(events=events, record=record)

    def stats(self) -> EngineStats:
        """A snapshot of queues, slots, tiers and counters."""
        return dataclasses.replace(self._stats, step_started_at=self._step_started_at)

    def resolve_adapter(self, folder: Path) -> None:
        """Check that this engine can serve the adapter in `folder`; raises Incompatible or AdapterInvalid with why."""
        manifest = load_manifest(folder)
        pin = manifest.base if manifest else None
        if pin is not None and pin.fingerprint != self.base.identity.fingerprint:
            raise BaseMismatch(
                f"the adapter belongs to {pin.id} ({pin.fingerprint[:19]}), "
                f"this server holds {self.base.identity.id} ({self.base.identity.fingerprint[:19]})",
                hint="ask a server of the adapter's own base",
                field="model",
            )
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
        """Stop the loaders; requests that are left are forgotten."""
        self._slots.close()

    def _take_commands(self) -> list[Event]:
        with self._lock:
            commands, self._commands = self._commands, _Commands()
        for use in commands.uses:
            self._slots.want(use.digest, use.folder)
        for submit, gate in commands.submits:
            text = TextStream(
                self.base.tokenizer,
                prompt=submit.prompt,
                stops=submit.sampling.stop,
                include_stop=submit.sampling.include_stop,
            )
            self._samplers[submit.id] = RowSampler(
                submit.sampling, prompt=submit.prompt, eos_token_ids=self.base.eos_token_ids, gate=gate
            )
            self._scheduler.add(Sequence.of(submit, text))
        cancelled = (self._scheduler.find(request_id) for request_id in dict.fromkeys(commands.cancels))
        events: list[Event] = [self._finish(found, "cancelled") for found in cancelled if found is not None]
        for digest in commands.unloads:
            self._slots.unload(digest)
        return events

    def _run(self, chosen: list[tuple[Sequence, int]]) -> list[Event]:
        """Compute the chosen tokens; an error ends the request that causes it and no other."""
        slots = self._slots.places()
        parts = [
            Part(
                tokens=sequence.tokens[sequence.num_computed : sequence.num_computed + num_tokens],
                length=sequence.num_computed + num_tokens,
                blocks=sequence.blocks,
                slots=tuple((slots[digest], weight) for digest, weight in sequence.adapter_key),
                num_logits=_num_logits(sequence, num_tokens),
            )
            for sequence, num_tokens in chosen
        ]
        wants_hidden = any(sequence.submit.wants_embedding for sequence, _ in chosen)

        def compute(some: Rows[Part]) -> tuple[Tensor, Tensor | None]:
            return self._runner.run_with_hidden(some) if wants_hidden else (self._runner.run(some), None)

        contained = run_contained(compute, parts)
        self._num_broken_steps = 0 if contained.runs else self._num_broken_steps + 1
        if self._num_broken_steps >= _MAX_BROKEN_STEPS and contained.broken:
            self._prove_sound()
        events = [self._fail(chosen[place][0], error) for place, error in contained.broken.items()]
        for places, (logits, hidden) in contained.runs:
            events += self._take_logits([(*chosen[place], parts[place].num_logits) for place in places], logits, hidden)
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

    def _take_logits(self, rows: list[tuple[Sequence, int, int]], logits: Tensor, hidden: Tensor | None) -> list[Event]:
        """Book what was computed of (sequence, tokens, rows of logits), and choose the next tokens that are due."""
        events: list[Event] = []
        draws = self._draws(rows)
        likeliest, finite = scan_rows(logits) if draws is None else choose_rows(logits, draws)
        row = 0
        for sequence, num_tokens, num_logits in rows:
            mine = logits[row : row + num_logits]
            row += num_logits
            if sequence.wants_prompt_logprobs:
                sequence.prompt_logprobs += prompt_logprobs(
                    mine,
                    sequence.tokens[: sequence.num_prompt],
                    first=sequence.num_computed,
                    num_top=sequence.submit.sampling.num_prompt_logprobs or 0,
                )
            self._scheduler.computed(sequence, num_tokens)
            if sequence.num_pending == 0 and hidden is not None and sequence.submit.wants_embedding:
                events.append(self._embed(sequence, hidden[row - 1]))
            elif sequence.num_pending == 0:
                is_drawn = draws is not None and draws[row - 1] is not None
                events += self._advance(
                    sequence, mine[-1], likeliest=likeliest[row - 1], is_finite=finite[row - 1], is_drawn=is_drawn
                )
        return events

    def _draws(self, rows: list[tuple[Sequence, int, int]]) -> list[Draw | None] | None:
        """What a card needs to draw each row's token itself; None on a CPU, where rows are chosen one by one."""
        if not self._runner.on_card:
            return None
        draws: list[Draw | None] = []
        for sequence, num_tokens, num_logits in rows:
            draws += [None] * num_logits
            if num_tokens == sequence.num_pending:
                draws[-1] = self._samplers[sequence.id].draw(sequence.num_outputs)
        return draws

    def _fail(self, sequence: Sequence, error: Exception | None = None) -> Event:
        """End a request that breaks steps, or whose output is no number (no error); its neighbours go on."""
        self._totals["contained"] += 1
        with self._lock:
            self._quarantine.note(sequence.submit)
        self._scheduler.distrust(sequence)
        failure = _not_finite()
        if error is not None:
            hint = "ask again; the server's log has more"
            failure = EngineFailure(f"a step failed: {type(error).__name__}", hint=hint)
        return self._end(sequence, Failed(id=sequence.id, error=failure))

    def _advance(
        self, sequence: Sequence, logits: Tensor, *, likeliest: int, is_finite: bool, is_drawn: bool
    ) -> list[Event]:
        """Choose a sequence's next token, show its text, and end it where it must end."""
        if not is_finite:
            return [self._fail(sequence)]
        sampling = sequence.submit.sampling
        sampler = self._samplers[sequence.id]
        choice = sampler.choose(logits, sequence.tokens[sequence.num_prompt :], likeliest=likeliest, is_drawn=is_drawn)
        if sampler.gate is not None and (failure_text := sampler.gate.failure) is not None:
            refusal = WillNotFit(f"the output's constraint became too complex: {failure_text}", field="response_format")
            return [self._end(sequence, Failed(id=sequence.id, error=refusal))]
        now = time.monotonic()
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        sequence.tokens.append(choice.token_id)
        self._totals["generated"] += 1
        if self._ends_at(choice.token_id, sequence):
            stop_id = choice.token_id if choice.token_id in sampling.stop_token_ids else None
            return [self._finish(sequence, "stop", stop_reason=stop_id)]
        piece = sequence.text.push(choice.token_id, min_tokens_reached=sequence.num_outputs >= sampling.min_tokens)
        events: list[Event] = [
            Token(
                id=sequence.id,
                token_id=choice.token_id,
                text=piece.text,
                logprob=choice.logprob,
                top=choice.top,
                timing=sequence.timing(now) if sequence.num_outputs == 1 else None,
            )
        ]
        if piece.stop is not None:
            events.append(self._finish(sequence, "stop", stop_reason=piece.stop, tail=False))
        elif sampler.gate is not None and sampler.gate.is_complete:
            events.append(self._finish(sequence, "stop"))
        elif sequence.num_outputs >= sampling.max_tokens or len(sequence.tokens) >= self.max_model_len:
            events.append(self._finish(sequence, "length"))
        return events

    def _embed(self, sequence: Sequence, hidden: Tensor) -> Event:
        """End a sequence with what its last token came to."""
        wide = hidden.float()
        unit = wide / wide.norm()
        if not bool(unit.isfinite().all()):
            return self._fail(sequence)
        return self._finish(sequence, "stop", embedding=tuple(unit.tolist()))

    def _ends_at(self, token_id: int, sequence: Sequence) -> bool:
        """Whether a chosen token is an end and not a part of the output."""
        sampling = sequence.submit.sampling
        is_eos, is_stop = token_id in self.base.eos_token_ids, token_id in sampling.stop_token_ids
        if sampling.constraint is not None:
            return is_eos or is_stop  # a sampler chooses no end against `min_tokens` unless nothing else is allowed
        return (is_stop or (is_eos and not sampling.ignore_eos)) and sequence.num_outputs >= sampling.min_tokens

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        stop_reason: str | int | None = None,
        tail: bool = True,
        embedding: tuple[float, ...] | None = None,
    ) -> Event:
        return self._end(
            sequence,
            Finished(
                id=sequence.id,
                reason=reason,
                text=sequence.text.finish() if tail else "",
                stop_reason=stop_reason,
                num_prompt_tokens=sequence.num_prompt,
                num_cached_tokens=sequence.num_cached,
                num_output_tokens=sequence.num_outputs,
                prompt_logprobs=sequence.shown_prompt_logprobs,
                embedding=embedding,
                timing=sequence.timing(time.monotonic()),
            ),
        )

    def _end(self, sequence: Sequence, event: Finished | Failed, *, is_removed: bool = False) -> Event:
        if not is_removed:
            self._scheduler.remove(sequence)
        del self._samplers[sequence.id]
        with self._lock:
            self._num_queued -= 1
        return event

    def _record(self, chosen: list[tuple[Sequence, int]], start: float) -> StepRecord:
        num_adapters = len({digest for sequence, _ in chosen for digest in sequence.digests})
        num_prefill = sum(number for sequence, number in chosen if sequence.num_computed <= sequence.num_prompt)
        self._totals["steps"] += 1
        self._totals["prompt"] += num_prefill
        self._totals["most_adapters"] = max(self._totals["most_adapters"], num_adapters)
        return StepRecord(
            seconds=time.monotonic() - start,
            num_tokens=sum(number for _, number in chosen),
            num_prefill_tokens=num_prefill,
            num_requests=len(chosen),
            num_distinct_adapters=num_adapters,
        )

    def _finish_step(self) -> None:
        self._step_started_at = None
        self._stats = self._snapshot()

    def _snapshot(self) -> EngineStats:
        scheduler, slots = self._scheduler, self._slots
        host_digests, host_bytes = slots.host()
        return EngineStats(
            waiting=dict(scheduler.wait_reasons),
            running=len(scheduler.running),
            kv_blocks_used=self._blocks.num_held,
            kv_blocks_total=self._blocks.num_blocks,
            kv_blocks_cached=self._blocks.num_kept,
            block_size=self.settings.block_size,
            num_slots=self.settings.num_slots,
            max_rank=self.settings.max_rank,
            slots=slots.slots(),
            host_digests=host_digests,
            host_bytes=host_bytes,
            running_adapters=_digests(scheduler.running),
            waiting_adapters=_digests(scheduler.waiting),
            counters=EngineCounters(
                num_prompt_tokens=self._totals["prompt"],
                num_cached_tokens=scheduler.num_prefix_hits,
                num_generated_tokens=self._totals["generated"],
                num_prefix_queries=scheduler.num_prefix_queries,
                num_prefix_hits=scheduler.num_prefix_hits,
                num_preemptions=scheduler.num_preemptions,
                num_adapter_loads=slots.num_loads,
                num_adapter_evictions=slots.num_evictions,
                num_adapter_load_failures=slots.num_failures,
                num_host_hits=slots.num_host_hits,
                num_steps=self._totals["steps"],
                num_contained_failures=self._totals["contained"],
                max_distinct_adapters_in_step=self._totals["most_adapters"],
            ),
        )


def _not_finite() -> EngineFailure:
    return EngineFailure("the model's output is not finite with this adapter and prompt")


def _num_logits(sequence: Sequence, num_tokens: int) -> int:
    """Rows whose logits somebody reads: the last one before a choice, or all while the prompt's are asked for."""
    if sequence.wants_prompt_logprobs:
        return num_tokens
    return int(num_tokens == sequence.num_pending)


def _digests(sequences: list[Sequence]) -> tuple[Digest, ...]:
    return tuple(dict.fromkeys(digest for sequence in sequences for digest in sequence.digests))
