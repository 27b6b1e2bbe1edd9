"""Counters and histograms that the server feeds as things happen; what is read at a scrape is `engine_metrics`.

No histogram has an adapter label, and the labels of adapters are bounded.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest

from loractl.adapters.local_cache import Stage
from loractl.adapters.reference import Digest
from loractl.server.engine.stats import LoadFault, LoadRecord, StepRecord
from loractl.server.fetch.canary import Track

PREFIX = "loractl_server_"
OTHER = "other"
Tier = Literal["hit_gpu", "hit_host", "hit_disk", "miss"]
TIERS: tuple[Tier, ...] = ("hit_gpu", "hit_host", "hit_disk", "miss")
"""Where an adapter was when it was asked for, nearest first."""

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_ITL = (0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_E2E = (0.01, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_PHASE = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_LOAD = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_SMALL = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)

REJECTIONS = (
    *("queue_full", "rate_limit", "draining", "too_long"),
    *("adapter_not_found", "adapter_invalid", "hub_down"),
)
LOAD_STAGES = ("lookup", "download", "verify", "read", "copy")
"""An adapter's way to its slot: its name in the hub, its files, their hashes, its numbers on the host, the copy."""
LOAD_FAULTS = ("hub", "digest", *get_args(LoadFault))
_LEVELS = ("gpu", "host", "disk")


class AdapterLabels:
    """Bounds the label `adapter`: the first `limit` names, then `other`; a name that has been idle makes room."""

    def __init__(self, limit: int = 200, *, idle_s: float = 600.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_overflows = 0
        self._limit = limit
        self._idle_s = idle_s
        self._clock = clock
        self._seen: OrderedDict[str, float] = OrderedDict()
        self._on_drop: list[Callable[[str], None]] = []

    def on_drop(self, forget: Callable[[str], None]) -> None:
        """Have `forget(label)` called for a name that made room."""
        self._on_drop.append(forget)

    def label(self, name: str) -> str:
        now = self._clock()
        if name not in self._seen and len(self._seen) >= self._limit and not self._drop_idle(now):
            self.num_overflows += 1
            return OTHER
        self._seen[name] = now
        self._seen.move_to_end(name)
        return name

    def _drop_idle(self, now: float) -> bool:
        name, used_at = next(iter(self._seen.items()))
        if now - used_at < self._idle_s:
            return False
        del self._seen[name]
        for forget in self._on_drop:
            forget(name)
        return True


class ServerMetrics:
    """All that is counted; one registry per server, so that tests and restarts never share state."""

    def __init__(self, *, max_adapter_labels: int = 200) -> None:
        self.registry = CollectorRegistry()
        self.labels = AdapterLabels(max_adapter_labels)
        self.names: OrderedDict[Digest, str] = OrderedDict()
        self._lock = threading.Lock()
        counter, histogram = self._counter, self._histogram
        self.requests = counter("requests", "HTTP requests answered.", "endpoint", "code")
        self.finished = counter("requests_finished", "Sequences ended, by how.", "finish_reason")
        self.rejected = counter("requests_rejected", "Requests refused, by why.", "reason")
        self.disconnects = counter("client_disconnects", "Clients that left before their answer was complete.", "stage")
        self.aborted_tokens = counter("aborted_tokens", "Tokens generated for clients that had left.", "stage")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished sequences.")
        self.generated_tokens = counter("generation_tokens", "Tokens generated for finished sequences.")
        self.slow_readers = counter("sse_write_stalls", "Streams cut because their reader was too slow.")
        self.adapter_requests = counter("adapter_requests", "Requests by adapter; base is the bare base.", "adapter")
        self.adapter_tokens = counter("adapter_tokens", "Tokens by adapter.", "adapter", "kind")
        self.adapter_errors = counter("adapter_errors", "Failed requests by adapter.", "adapter", "reason")
        self.ttft = histogram("time_to_first_token_seconds", "From the request to its first token.", _TTFT, "stream")
        self.itl = histogram("inter_token_latency_seconds", "Between tokens of a sequence.", _ITL, "stream")
        self.tpot = histogram("time_per_output_token_seconds", "Mean of a sequence after its first token.", _ITL)
        self.e2e = histogram("e2e_request_seconds", "From the request to the end of its answer.", _E2E, "stream")
        self.queue = histogram("queue_seconds", "Waiting for a place in the batch.", _PHASE)
        waited = "Waiting for the adapter to be resident, by where it was."
        self.adapter_wait = histogram("adapter_wait_seconds", waited, _PHASE, "outcome")
        self.hub_calls = counter("hub_requests", "Questions to the hub, by outcome.", "op", "code")
        self.hub_seconds = histogram(
            "hub_request_seconds", "A question to the hub: a name, or a download.", _PHASE, "op"
        )
        self.adapter_load = histogram("adapter_load_seconds", "An adapter's way to its slot.", _LOAD, "stage")
        self.load_failures = counter("adapter_load_failures", "Adapters that could not be had, by why.", "reason")
        self.tier_lookups = counter("adapter_cache_requests", "Adapters looked for, by level.", "level", "result")
        self.loop_lag = histogram("event_loop_lag_seconds", "How late the event loop woke.", _LAG)
        self.prefill = histogram("prefill_seconds", "From the first step to the first token.", _PHASE)
        self.decode = histogram("decode_seconds", "From the first token to the last.", _PHASE)
        self.request_prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a sequence.", _TOKENS)
        self.request_output_tokens = histogram("request_generation_tokens", "Generated tokens of a sequence.", _TOKENS)
        self.step = histogram("step_seconds", "One forward pass.", _ITL, "phase")
        self.batch_requests = histogram("batch_requests", "Sequences in a step.", _SMALL)
        self.batch_adapters = histogram("batch_distinct_adapters", "Distinct adapters in a step.", (0, *_SMALL))
        self.batch_tokens = histogram("batch_tokens", "Tokens in a step.", _TOKENS)
        tracks = ("adapter", "version", "track")
        self.canary_requests = counter("canary_requests", "Requests by channels with a canary, by version.", *tracks)
        self.canary_errors = counter("canary_errors", "Failed sequences of those requests.", *tracks)
        self.canary_tokens = counter("canary_generation_tokens", "Tokens generated for those requests.", *tracks)
        self.canary_seconds = counter("canary_request_seconds", "Seconds that those requests took, summed.", *tracks)
        self._show_zeros()
        ProcessCollector(registry=self.registry)
        self.labels.on_drop(self._forget_adapter)
        self._versions = AdapterLabels(max_adapter_labels)
        self._versions.on_drop(self._forget_version)

    def _show_zeros(self) -> None:
        """A series that appears with its first event hides that event from `rate`."""
        for name in ("stop", "length", "abort", "error", "deadline"):
            self.finished.labels(name)
        for name in REJECTIONS:
            self.rejected.labels(name)
        for stage in ("queued", "decode"):
            self.disconnects.labels(stage)
            self.aborted_tokens.labels(stage)
        for endpoint in ("/v1/chat/completions", "/v1/completions"):
            for code in ("200", "400", "404", "429", "500", "503"):
                self.requests.labels(endpoint, code)
        for tier in TIERS:
            self.adapter_wait.labels(tier)
        for stage in LOAD_STAGES:
            self.adapter_load.labels(stage)
        for fault in LOAD_FAULTS:
            self.load_failures.labels(fault)
        for level in _LEVELS:
            for result in ("hit", "miss"):
                self.tier_lookups.labels(level, result)
        for op in ("resolve", "fetch"):
            self.hub_calls.labels(op, "ok")
            self.hub_calls.labels(op, "unreachable")
            self.hub_seconds.labels(op)

    def saw_hub_call(self, op: str, code: str, seconds: float) -> None:
        """Take in one question to the hub; `code` is ok or an error's."""
        self.hub_calls.labels(op, code).inc()
        self.hub_seconds.labels(op).observe(seconds)
        if op == "resolve" and code == "ok":
            self.adapter_load.labels("lookup").observe(seconds)
        elif op == "fetch" and code != "ok":
            self.load_failures.labels("digest" if code == "adapter_invalid" else "hub").inc()

    def saw_cache_stage(self, stage: Stage, seconds: float) -> None:
        """Take in one stage of the disk cache's work; called from its threads."""
        self.adapter_load.labels("download" if stage == "fill" else stage).observe(seconds)

    def saw_tier(self, tier: Tier) -> None:
        """Take in where an adapter was: a miss at each level before it."""
        place = TIERS.index(tier)
        for level in _LEVELS[:place]:
            self.tier_lookups.labels(level, "miss").inc()
        if place < len(_LEVELS):
            self.tier_lookups.labels(_LEVELS[place], "hit").inc()

    def saw_load(self, load: LoadRecord) -> None:
        """Take in one adapter's way into a slot, or why it has none."""
        if load.fault is not None:
            self.load_failures.labels(load.fault).inc()
        for stage, seconds in (("read", load.read_s), ("copy", load.copy_s)):
            if seconds is not None:
                self.adapter_load.labels(stage).observe(seconds)

    def saw_step(self, record: StepRecord) -> None:
        """Take in one forward pass."""
        decoding = record.num_tokens - record.num_prefill_tokens
        phase = "decode" if not record.num_prefill_tokens else "mixed" if decoding else "prefill"
        self.step.labels(phase).observe(record.seconds)
        self.batch_requests.observe(record.num_requests)
        self.batch_adapters.observe(record.num_distinct_adapters)
        self.batch_tokens.observe(record.num_tokens)

    def name_adapter(self, digest: Digest, name: str) -> None:
        """Remember under which name a digest was last asked for, to label what is resident."""
        self.names[digest] = name
        self.names.move_to_end(digest)
        while len(self.names) > 10_000:
            self.names.popitem(last=False)

    def track_labels(self, name: str, version: str, track: Track) -> tuple[str, str, Track]:
        """Labels of one side of a channel's canary; as bounded as those of adapters."""
        if self._versions.label(f"{name}\0{version}\0{track}") == OTHER:
            return OTHER, OTHER, track
        return name, version, track

    def page(self) -> bytes:
        """The page for Prometheus; takes milliseconds, so call it off the event loop."""
        with self._lock:
            return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=self.registry)

    def _forget_version(self, label: str) -> None:
        adapter, version, track = label.split("\0")
        for family in (self.canary_requests, self.canary_errors, self.canary_tokens, self.canary_seconds):
            family.remove_by_labels({"adapter": adapter, "version": version, "track": track})

    def _forget_adapter(self, label: str) -> None:
        self.adapter_requests.remove_by_labels({"adapter": label})
        self.adapter_tokens.remove_by_labels({"adapter": label})
        self.adapter_errors.remove_by_labels({"adapter": label})
