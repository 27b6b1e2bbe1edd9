"""What Prometheus sees: counters and histograms that the server feeds, and gauges read from the engine at each scrape.

No histogram has an adapter label, and the labels of adapters are bounded; what is resident is told as it is.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from loractl.adapters.local_cache import AdapterCache
from loractl.adapters.reference import Digest
from loractl.server.canary import Track
from loractl.server.engine.stats import EngineStats, StepRecord

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
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_DISK_FRESH_S = 15.0
"""How long the size of the disk cache is believed: counting it reads every folder."""
_SMALL = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)

REJECTIONS = (
    *("queue_full", "rate_limit", "draining", "too_long"),
    *("adapter_not_found", "adapter_invalid", "hub_down"),
)


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
        for name in ("stop", "length", "abort", "error"):
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
        for op in ("resolve", "fetch"):
            self.hub_calls.labels(op, "ok")
            self.hub_calls.labels(op, "unreachable")
            self.hub_seconds.labels(op)

    def saw_hub_call(self, op: str, code: str, seconds: float) -> None:
        """Take in one question to the hub; `code` is ok or an error's."""
        self.hub_calls.labels(op, code).inc()
        self.hub_seconds.labels(op).observe(seconds)

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


class EngineCollector(Collector):
    """Gauges and counters read from one snapshot of the engine at each scrape; nothing here can go stale."""

    def __init__(self, snapshot: "Callable[[], Snapshot]", *, disk: AdapterCache | None = None) -> None:
        self._snapshot = snapshot
        self._version = version("loractl")
        self._disk = disk
        self._disk_bytes = (float("-inf"), 0)

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        seen = self._snapshot()
        stats = seen.stats
        yield _gauge("build_info", "The server's version.", 1, {"version": self._version})
        yield _gauge("config_info", "What is served.", 1, dict(seen.config))
        blocks = {"block_size": str(stats.block_size), "num_gpu_blocks": str(stats.kv_blocks_total)}
        yield _gauge("cache_config_info", "Sizes of the KV cache.", 1, blocks)
        for name, text, value in seen.gauges:
            yield _gauge(name, text, value)
        yield from _queue_families(stats)
        yield from _cache_families(stats)
        yield from _adapter_families(seen)
        yield from self._cache_bytes(stats)
        for name, text, count in _counters(stats):
            yield CounterMetricFamily(PREFIX + name, text, value=count)
        for name, text, count in seen.counters:
            yield CounterMetricFamily(PREFIX + name, text, value=count)

    def _cache_bytes(self, stats: EngineStats) -> Iterable[GaugeMetricFamily]:
        size = GaugeMetricFamily(PREFIX + "adapter_cache_bytes", "Bytes of adapters kept, by level.", labels=["level"])
        size.add_metric(["host"], stats.host_bytes)
        if self._disk is not None:
            now = time.monotonic()
            if now - self._disk_bytes[0] > _DISK_FRESH_S:
                self._disk_bytes = now, sum(cached.size_bytes for cached in self._disk.list())
            size.add_metric(["disk"], self._disk_bytes[1])
        yield size
        if self._disk is not None and self._disk.max_bytes is not None:
            limit = self._disk.max_bytes
            yield _gauge("adapter_cache_limit_bytes", "Most that is kept, by level.", limit, {"level": "disk"})


class Snapshot:
    """One moment of the server, as the collector and the routing page need it."""

    def __init__(
        self,
        *,
        stats: EngineStats,
        names: Mapping[Digest, str],
        config: Mapping[str, str],
        gauges: Sequence[tuple[str, str, float]] = (),
        counters: Sequence[tuple[str, str, float]] = (),
    ) -> None:
        self.stats = stats
        self.names = names
        self.config = config
        self.gauges = gauges
        self.counters = counters

    def name(self, digest: Digest) -> str:
        return self.names.get(digest, digest[:19])


def _gauge(name: str, text: str, value: float, labels: Mapping[str, str] | None = None) -> GaugeMetricFamily:
    family = GaugeMetricFamily(PREFIX + name, text, labels=list(labels or {}))
    family.add_metric(list((labels or {}).values()), value)
    return family


def _queue_families(stats: EngineStats) -> Iterable[GaugeMetricFamily]:
    yield _gauge("requests_waiting", "Sequences that wait.", sum(stats.waiting.values()))
    yield _gauge("requests_running", "Sequences that generate.", stats.running)
    family = GaugeMetricFamily(
        PREFIX + "requests_waiting_by_reason", "Sequences that wait, by what for.", labels=["reason"]
    )
    for reason, count in stats.waiting.items():
        family.add_metric([reason], count)
    yield family


def _cache_families(stats: EngineStats) -> Iterable[GaugeMetricFamily]:
    yield _gauge("kv_cache_usage_ratio", "Share of KV blocks that requests hold.", kv_usage(stats))
    family = GaugeMetricFamily(PREFIX + "kv_blocks", "KV blocks, by state.", labels=["state"])
    family.add_metric(["used"], stats.kv_blocks_used)
    family.add_metric(["free"], stats.kv_blocks_total - stats.kv_blocks_used)
    family.add_metric(["cached"], stats.kv_blocks_cached)
    yield family
    most = stats.counters.max_distinct_adapters_in_step
    yield _gauge("batch_distinct_adapters_max", "Most distinct adapters seen in one step.", most)


def _adapter_families(seen: Snapshot) -> Iterable[GaugeMetricFamily]:
    stats = seen.stats
    levels: dict[tuple[str, str], int] = {}
    for slot in stats.slots:
        levels[seen.name(slot.digest), "pinned" if slot.pinned else "gpu"] = 1
    for digest in stats.host_digests:
        levels[seen.name(digest), "host"] = 1
    resident = GaugeMetricFamily(
        PREFIX + "adapter_resident", "1 for each adapter that is resident, by level.", labels=["adapter", "level"]
    )
    for (name, level), value in levels.items():
        resident.add_metric([name, level], value)
    yield resident
    slots = GaugeMetricFamily(PREFIX + "adapter_slots", "Slots for adapters, by state.", labels=["level", "state"])
    slots.add_metric(["gpu", "used"], len(stats.slots))
    slots.add_metric(["gpu", "total"], stats.num_slots)
    slots.add_metric(["gpu", "pinned"], sum(slot.pinned for slot in stats.slots))
    yield slots


def _counters(stats: EngineStats) -> Iterable[tuple[str, str, float]]:
    counters = stats.counters
    yield "prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", counters.num_prefix_queries
    yield "prefix_cache_hits", "Prompt tokens found in the prefix cache.", counters.num_prefix_hits
    yield "preemptions", "Sequences put back for lack of KV blocks.", counters.num_preemptions
    yield "adapter_loads", "Adapters brought into a slot.", counters.num_adapter_loads
    yield "adapter_evictions", "Adapters that made room for others.", counters.num_adapter_evictions
    yield "adapter_load_failures", "Adapters that could not be loaded.", counters.num_adapter_load_failures
    yield "adapter_host_hits", "Loads that found the adapter in host memory.", counters.num_host_hits
    yield "steps", "Forward passes.", counters.num_steps
    yield (
        "isolated_requests",
        "Requests that failed alone in a step.",
        counters.num_contained_failures,
    )


def kv_usage(stats: EngineStats) -> float:
    return stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0


def routing_page(seen: Snapshot) -> str:
    """What a router polls many times a second: queues, KV, and which adapters are resident. Under a kilobyte a server.

    Types and label names follow the model-server protocol of the Gateway API Inference Extension; `running` means
    resident in a slot, as its text says.
    """
    stats = seen.stats
    # Both versions of a channel with a canary go by the channel's name.
    running = ",".join(dict.fromkeys(seen.name(slot.digest) for slot in stats.slots if not slot.loading))
    waiting = ",".join(sorted({seen.name(digest) for digest in stats.waiting_adapters}))
    gauges = {
        "requests_waiting": sum(stats.waiting.values()),
        "requests_running": stats.running,
        "kv_cache_usage_ratio": kv_usage(stats),
    }
    lines: list[str] = []
    for name, value in gauges.items():
        lines += [f"# TYPE {PREFIX}{name} gauge", f"{PREFIX}{name} {value:g}"]
    blocks = f'block_size="{stats.block_size}",num_gpu_blocks="{stats.kv_blocks_total}"'
    lines += [f"# TYPE {PREFIX}cache_config_info gauge", f"{PREFIX}cache_config_info{{{blocks}}} 1"]
    adapters = f'max_lora="{stats.num_slots}",running_lora_adapters="{running}",waiting_lora_adapters="{waiting}"'
    lines += [f"# TYPE {PREFIX}lora_requests_info gauge", f"{PREFIX}lora_requests_info{{{adapters}}} {time.time():.3f}"]
    return "\n".join(lines) + "\n"
