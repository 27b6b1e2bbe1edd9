"""What the engine tells about itself: immutable snapshots, safe to read from any thread. Knows no metrics library."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from loractl.adapters.reference import Digest
from loractl.server.engine.messages import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One forward pass."""

    seconds: float
    num_tokens: int
    num_prefill_tokens: int
    num_requests: int
    num_distinct_adapters: int


LoadFault = Literal["invalid", "base", "unsupported", "disk", "oom"]
"""Why an adapter could not be loaded: broken files, another base's, a feature not served, the disk, memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRecord:
    """One adapter's way into a slot, in seconds; a stage is None where there was none or it failed."""

    read_s: float | None = None
    """From its files to the numbers of a slot; None for an adapter that the host had kept."""
    copy_s: float | None = None
    """From the host into the slot, until steps may read it."""
    fault: LoadFault | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one call of `Engine.step` brought: events in order, and the pass itself unless there was nothing to run."""

    events: list[Event]
    record: StepRecord | None
    loads: tuple[LoadRecord, ...] = ()
    """Adapters that arrived in their slots, or could not be loaded, since the last call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotStats:
    """One slot that holds, or is being given, an adapter."""

    digest: Digest
    rank: int
    pinned: bool
    num_running: int
    """Requests that hold the slot now."""
    loading: bool = False
    energy_kept: float = 1.0
    """Share of the adapter's squared change that is served; below 1.0 when its rank was cut to the slots'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCounters:
    """Totals since the engine started."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_prefix_queries: int = 0
    """Prompt tokens that were looked up in the prefix cache."""
    num_prefix_hits: int = 0
    """Those that were found."""
    num_preemptions: int = 0
    num_adapter_loads: int = 0
    num_adapter_evictions: int = 0
    num_adapter_load_failures: int = 0
    num_host_evictions: int = 0
    num_host_hits: int = 0
    """Loads that found the adapter in host memory."""
    num_steps: int = 0
    num_contained_failures: int = 0
    """Requests that failed alone because a step with them did."""
    num_nonfinite: int = 0
    """Those of them whose output was no number."""
    num_out_of_memory: int = 0
    """Attempts at a step that ran out of memory."""
    max_distinct_adapters_in_step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot of the whole engine."""

    waiting: Mapping[str, int] = field(default_factory=dict[str, int])
    """Requests that wait, by reason: `new`, `turn`, `adapter`, `kv`, `distinct`."""
    running: int = 0
    kv_blocks_used: int = 0
    """Blocks that requests hold; blocks that only the prefix cache holds count as free."""
    kv_blocks_total: int = 0
    kv_blocks_cached: int = 0
    block_size: int = 0
    num_slots: int = 0
    max_rank: int = 0
    slots: tuple[SlotStats, ...] = ()
    host_digests: tuple[Digest, ...] = ()
    host_bytes: int = 0
    host_limit_bytes: int = 0
    quarantined_adapters: Mapping[LoadFault, int] = field(default_factory=dict[LoadFault, int])
    """Adapters whose last load failed within the last minutes, by why."""
    num_quarantined_requests: int = 0
    """Prompts that are refused for now because they broke several steps."""
    running_adapters: tuple[Digest, ...] = ()
    waiting_adapters: tuple[Digest, ...] = ()
    counters: EngineCounters = EngineCounters()
    step_started_at: float | None = None
    """`time.monotonic()` at the start of the step that runs now; an old value means a hung step."""
