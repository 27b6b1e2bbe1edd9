"""Stand-ins that keep unit tests of the server fast: an engine without a model, with faults to order."""

import itertools
import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field, replace
from typing import Any

from loractl.adapters.errors import BadRequest, NotFound, Overloaded
from loractl.adapters.reference import Digest
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
    Timing,
    Token,
    TokenLogprob,
)
from loractl.server.engine.stats import EngineCounters, EngineStats, SlotStats, StepRecord, StepResult


@dataclass(slots=True)
class _Row:
    submit: Submit
    produced: list[int] = field(default_factory=list[int])
    text: str = ""
    shown: int = 0


class FakeEngine:
    """Answers each prompt with the prompt itself, over and over, one token a step, through the given tokenizer.

    With an adapter, the answer starts with the adapter's digest, so that a test sees whose answer it got.
    `answer_text` makes it say that text instead, and then stop.
    Faults to order: `raise_in_step` (once), `hang` (an Event that is waited for).
    Sizes to order: `step_s`, `max_queue`, `max_running`, `num_slots`.
    """

    def __init__(self, tokenizer: Any, *, max_model_len: int = 512, max_queue: int = 1000) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.max_queue = max_queue
        self.max_running = 1 << 30
        self.answer_text: str | None = None
        self.step_s = 0.0
        self.raise_in_step: BaseException | None = None
        self.hang: threading.Event | None = None
        self.submitted: list[Submit] = []
        self.cancelled: list[RequestId] = []
        self.pinned: set[Digest] = set()
        self.resident: OrderedDict[Digest, int] = OrderedDict()  # least recently used first
        self.num_slots = 8
        self.failing: dict[Digest, Any] = {}
        self.is_closed = False
        self.num_steps = 0
        self._inbox: deque[Submit | Cancel] = deque()
        self._wake = threading.Condition()
        self._rows: dict[RequestId, _Row] = {}
        self._max_distinct = 0

    def check_constraint(self, constraint: Constraint) -> None:
        del constraint

    def submit(self, request: Submit) -> None:
        if not request.prompt:
            raise BadRequest("the prompt is empty", field="prompt")
        with self._wake:
            if len(self._rows) + len(self._inbox) >= self.max_queue:
                raise Overloaded("the queue is full", retry_after_s=2)
            self.submitted.append(request)
            self._inbox.append(request)
            self._wake.notify_all()

    def cancel(self, request: Cancel) -> None:
        with self._wake:
            self._inbox.append(request)
            self._wake.notify_all()

    def wait_for_work(self, timeout_s: float) -> bool:
        with self._wake:
            return self._wake.wait_for(lambda: bool(self._inbox or self._rows), timeout_s)

    def step(self) -> StepResult:
        started = time.monotonic()
        self.num_steps += 1
        events = self._take_inbox()
        if self.hang is not None:
            self.hang.wait()
        if self.raise_in_step is not None:
            error, self.raise_in_step = self.raise_in_step, None
            raise error
        if self.step_s:
            # Not time.sleep, which libfaketime breaks.
            threading.Event().wait(self.step_s)
        rows = list(itertools.islice(self._rows.values(), self.max_running))
        distinct = {use.digest for row in rows for use in row.submit.adapters}
        self._max_distinct = max(self._max_distinct, len(distinct))
        for row in rows:
            events += self._advance(row)
        record = StepRecord(
            seconds=time.monotonic() - started,
            num_tokens=len(rows),
            num_prefill_tokens=0,
            num_requests=len(rows),
            num_distinct_adapters=len(distinct),
        )
        return StepResult(events=events, record=record if rows else None)

    def _take_inbox(self) -> list[Event]:
        events: list[Event] = []
        with self._wake:
            messages = list(self._inbox)
            self._inbox.clear()
        for message in messages:
            if isinstance(message, Cancel):
                self.cancelled.append(message.id)
                row = self._rows.pop(message.id, None)
                if row is not None:
                    events.append(self._finish(row, "cancelled"))
                continue
            broken = [self.failing[use.digest] for use in message.adapters if use.digest in self.failing]
            if broken:
                events.append(Failed(id=message.id, error=broken[0]))
                continue
            self._rows[message.id] = _Row(message)
            for use in message.adapters:
                self._bring(use.digest)
        return events

    def _answer(self, row: _Row) -> list[int]:
        if self.answer_text is not None:
            return list(self.tokenizer.encode(self.answer_text, add_special_tokens=False))
        prompt = list(row.submit.prompt)
        if row.submit.adapters:
            marks = "+".join(use.digest[7:15] for use in row.submit.adapters)
            return [*self.tokenizer.encode(f"<{marks}>", add_special_tokens=False), *prompt]
        return prompt

    def _advance(self, row: _Row) -> list[Event]:
        if row.submit.wants_embedding:
            del self._rows[row.submit.id]
            return [replace(self._finish(row, "stop"), embedding=(0.6, 0.0, -0.8))]
        sampling, answer = row.submit.sampling, self._answer(row)
        token_id = answer[len(row.produced) % len(answer)]
        row.produced.append(token_id)
        row.text = self.tokenizer.decode(row.produced)
        stop = next((text for text in sampling.stop if text in row.text), None)
        if stop is not None:
            row.text = row.text[: row.text.index(stop) + (len(stop) if sampling.include_stop else 0)]
        has_said_all = self.answer_text is not None and len(row.produced) == len(answer)
        is_last = stop is not None or has_said_all or len(row.produced) >= sampling.max_tokens
        held = 0 if is_last else max((len(text) - 1 for text in sampling.stop), default=0)
        visible = max(row.shown, len(row.text) - held)
        text, row.shown = row.text[row.shown : visible], visible
        logprobs: dict[str, Any] = {}
        if sampling.num_logprobs is not None:
            others = [(token_id + 1 + rank) % 384 for rank in range(max(0, sampling.num_logprobs - 1))]
            ranked = [token_id, *others][: sampling.num_logprobs]
            logprobs = {
                "logprob": -0.25,
                "top": tuple(TokenLogprob(token_id=each, logprob=-0.25 - place) for place, each in enumerate(ranked)),
            }
        events: list[Event] = [
            Token(
                id=row.submit.id,
                token_id=token_id,
                text=text,
                timing=Timing() if len(row.produced) == 1 else None,
                **logprobs,
            )
        ]
        if is_last:
            del self._rows[row.submit.id]
            events.append(self._finish(row, "stop" if stop is not None or has_said_all else "length", stop))
        return events

    def _finish(self, row: _Row, reason: FinishReason, stop: str | None = None) -> Finished:
        return Finished(
            id=row.submit.id,
            reason=reason,
            stop_reason=stop,
            num_prompt_tokens=len(row.submit.prompt),
            num_output_tokens=len(row.produced),
            timing=Timing(queued_s=0.001, adapter_wait_s=0.002, prefill_s=0.003, decode_s=0.004),
        )

    def device_memory(self) -> dict[str, int]:
        return {"weights": 1000, "kv": 200, "adapters": 30}

    def stats(self) -> EngineStats:
        with self._wake:
            resident = list(self.resident)
        slots = tuple(
            SlotStats(digest=digest, rank=4, pinned=digest in self.pinned, num_running=0) for digest in resident
        )
        return EngineStats(
            waiting={"new": len(self._inbox), "turn": max(0, len(self._rows) - self.max_running)},
            running=min(len(self._rows), self.max_running),
            kv_blocks_total=100,
            kv_blocks_used=len(self._rows),
            block_size=16,
            num_slots=self.num_slots,
            max_rank=64,
            slots=slots,
            counters=EngineCounters(max_distinct_adapters_in_step=self._max_distinct),
        )

    def prefetch(self, use: AdapterUse) -> None:
        # The real one brings it near; here that is a slot, if one is free.
        if len(self.resident) < self.num_slots:
            self._bring(use.digest)

    def _bring(self, digest: Digest) -> None:
        with self._wake:
            self.resident.setdefault(digest, len(self.resident))
            self.resident.move_to_end(digest)
            rows = list(self._rows.values())
            held = {use.digest for row in rows for use in row.submit.adapters} | self.pinned | {digest}
            idle = [each for each in self.resident if each not in held]
            for each in idle[: max(0, len(self.resident) - self.num_slots)]:
                del self.resident[each]

    def pin(self, digest: Digest) -> None:
        if digest not in self.resident:
            raise NotFound(f"no adapter {digest}")
        self.pinned.add(digest)

    def unpin(self, digest: Digest) -> None:
        self.pinned.discard(digest)

    def unload(self, digest: Digest) -> None:
        self.resident.pop(digest, None)

    def close(self) -> None:
        self.is_closed = True
