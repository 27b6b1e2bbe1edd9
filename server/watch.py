"""Watches one request's events on their way to its client, for metrics and traces. Changes nothing."""

import time
from collections.abc import AsyncIterator, Mapping, Sequence

from loractl.adapters.errors import DeadlinePassed
from loractl.server.bridge import Ticket
from loractl.server.engine.messages import Event, Failed, Finished, RequestId, Timing, Token
from loractl.server.fetch.canary import Track
from loractl.server.metrics import ServerMetrics, Tier
from loractl.server.tracing import RequestTrace


class Watch:
    """A ticket whose events are timed and counted as they pass."""

    def __init__(
        self,
        ticket: Ticket,
        metrics: ServerMetrics,
        *,
        adapters: Sequence[str],
        is_stream: bool,
        tracks: Sequence[tuple[str, str, Track]] = (),
        trace: RequestTrace | None = None,
        tier: Tier | None = None,
    ) -> None:
        self.ticket = ticket
        self.ids: tuple[RequestId, ...] = ticket.ids
        self.index: Mapping[RequestId, int] = ticket.index
        self._metrics = metrics
        self._adapters = [metrics.labels.label(name) for name in adapters]
        self._mode = "true" if is_stream else "false"
        self._started = time.monotonic()
        self._last: dict[RequestId, float] = {}
        self.timing: Timing | None = None
        """Of the sequence that was heard of first."""
        self._ttft = metrics.ttft.labels(self._mode)
        self._itl = metrics.itl.labels(self._mode)
        self._tracks = tracks
        self._trace = trace
        self._tier = tier
        self.num_tokens = 0
        for name in self._adapters:
            metrics.adapter_requests.labels(name).inc()
        for track in tracks:
            metrics.canary_requests.labels(*track).inc()
            metrics.canary_errors.labels(*track)  # there from the start, so that its first error is seen to come

    async def events(self) -> AsyncIterator[list[Event]]:
        async for batch in self.ticket.events():
            now = time.monotonic()
            for event in batch:
                if isinstance(event, Token):
                    self._saw_token(event, now)
                elif isinstance(event, Finished):
                    self._saw_end(event)
                else:
                    self._saw_failure(event)
            yield batch
        took_s = time.monotonic() - self._started
        self._metrics.e2e.labels(self._mode).observe(took_s)
        for track in self._tracks:
            self._metrics.canary_seconds.labels(*track).inc(took_s)

    @property
    def stage(self) -> str:
        """How far the request has come: queued or decode."""
        return "decode" if self._last else "queued"

    def _saw_token(self, token: Token, now: float) -> None:
        self.num_tokens += 1
        before = self._last.get(token.id)
        if before is None:
            self._ttft.observe(now - self._started)
            self.timing = self.timing or token.timing
        else:
            self._itl.observe(now - before)
        self._last[token.id] = now

    def _saw_end(self, end: Finished) -> None:
        metrics, timing = self._metrics, end.timing
        if self._trace is not None:
            self._trace.sequence_ended(end)
        self.timing = self.timing or timing
        metrics.finished.labels("abort" if end.reason == "cancelled" else end.reason).inc()
        metrics.prompt_tokens.inc(end.num_prompt_tokens)
        metrics.generated_tokens.inc(end.num_output_tokens)
        metrics.request_prompt_tokens.observe(end.num_prompt_tokens)
        metrics.request_output_tokens.observe(end.num_output_tokens)
        metrics.queue.observe(timing.queued_s)
        if self._tier is not None:
            metrics.adapter_wait.labels(self._tier).observe(timing.adapter_wait_s)
        metrics.prefill.observe(timing.prefill_s)
        metrics.decode.observe(timing.decode_s)
        if end.num_output_tokens > 1:
            metrics.tpot.observe(timing.decode_s / (end.num_output_tokens - 1))
        for name in self._adapters:
            metrics.adapter_tokens.labels(name, "prompt").inc(end.num_prompt_tokens)
            metrics.adapter_tokens.labels(name, "generation").inc(end.num_output_tokens)
        for track in self._tracks:
            metrics.canary_tokens.labels(*track).inc(end.num_output_tokens)

    def _saw_failure(self, failure: Failed) -> None:
        if self._trace is not None:
            self._trace.sequence_failed(failure)
        has_waited_too_long = isinstance(failure.error, DeadlinePassed)
        self._metrics.finished.labels("deadline" if has_waited_too_long else "error").inc()
        for name in self._adapters:
            self._metrics.adapter_errors.labels(name, failure.error.code.lower()).inc()
        for track in self._tracks:
            self._metrics.canary_errors.labels(*track).inc()
