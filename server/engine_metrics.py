"""What is read from the engine at each scrape, for Prometheus and for routers; nothing here can go stale."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from loractl.adapters.local_cache import AdapterCache
from loractl.adapters.reference import Digest
from loractl.server.engine.stats import EngineStats, LoadFault
from loractl.server.metrics import PREFIX

_DISK_FRESH_S = 15.0
"""How long the size of the disk cache is believed: counting it reads every folder."""


class EngineCollector(Collector):
    """Gauges and counters read from one snapshot of the engine at each scrape."""

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
        yield from _quarantine_families(stats)
        yield _labelled("device_memory_bytes", "Memory that the engine holds.", "kind", seen.device_memory)
        yield from self._cache_bytes(stats)
        yield self._evictions(stats)
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
        limits = {"host": stats.host_limit_bytes}
        if self._disk is not None and self._disk.max_bytes is not None:
            limits["disk"] = self._disk.max_bytes
        yield _labelled("adapter_cache_limit_bytes", "Most that is kept, by level.", "level", limits)

    def _evictions(self, stats: EngineStats) -> CounterMetricFamily:
        text = "Adapters that made room for others, by level."
        family = CounterMetricFamily(PREFIX + "adapter_evictions", text, labels=["level"])
        family.add_metric(["gpu"], stats.counters.num_adapter_evictions)
        family.add_metric(["host"], stats.counters.num_host_evictions)
        if self._disk is not None:
            family.add_metric(["disk"], self._disk.num_evictions)
        return family


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
        device_memory: Mapping[str, int] | None = None,
    ) -> None:
        self.stats = stats
        self.names = names
        self.config = config
        self.gauges = gauges
        self.counters = counters
        self.device_memory = device_memory or {}

    def name(self, digest: Digest) -> str:
        return self.names.get(digest, digest[:19])


def _gauge(name: str, text: str, value: float, labels: Mapping[str, str] | None = None) -> GaugeMetricFamily:
    family = GaugeMetricFamily(PREFIX + name, text, labels=list(labels or {}))
    family.add_metric(list((labels or {}).values()), value)
    return family


def _labelled(name: str, text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(PREFIX + name, text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


def _queue_families(stats: EngineStats) -> Iterable[GaugeMetricFamily]:
    yield _gauge("requests_waiting", "Sequences that wait.", sum(stats.waiting.values()))
    yield _gauge("requests_running", "Sequences that generate.", stats.running)
    yield _labelled("requests_waiting_by_reason", "Sequences that wait, by what for.", "reason", stats.waiting)


def _cache_families(stats: EngineStats) -> Iterable[GaugeMetricFamily]:
    yield _gauge("kv_cache_usage_ratio", "Share of KV blocks that requests hold.", kv_usage(stats))
    blocks = {
        "used": stats.kv_blocks_used,
        "free": stats.kv_blocks_total - stats.kv_blocks_used,
        "cached": stats.kv_blocks_cached,
    }
    yield _labelled("kv_blocks", "KV blocks, by state.", "state", blocks)
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


def _quarantine_families(stats: EngineStats) -> Iterable[GaugeMetricFamily]:
    told = {fault: stats.quarantined_adapters.get(fault, 0) for fault in get_args(LoadFault)}
    yield _labelled("adapters_quarantined", "Adapters that could not be loaded lately, by why.", "reason", told)
    text = "Prompts that are refused for now because they broke several steps."
    yield _gauge("requests_quarantined", text, stats.num_quarantined_requests)


def _counters(stats: EngineStats) -> Iterable[tuple[str, str, float]]:
    counters = stats.counters
    yield "prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", counters.num_prefix_queries
    yield "prefix_cache_hits", "Prompt tokens found in the prefix cache.", counters.num_prefix_hits
    yield "preemptions", "Sequences put back for lack of KV blocks.", counters.num_preemptions
    yield "adapter_loads", "Adapters brought into a slot.", counters.num_adapter_loads
    yield "adapter_host_hits", "Loads that found the adapter in host memory.", counters.num_host_hits
    yield "steps", "Forward passes.", counters.num_steps
    yield (
        "isolated_requests",
        "Requests that failed alone in a step.",
        counters.num_contained_failures,
    )
    yield "nonfinite_logits", "Requests whose output was no number.", counters.num_nonfinite
    yield "oom", "Attempts at a step that ran out of memory.", counters.num_out_of_memory


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
