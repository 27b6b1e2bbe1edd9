"""Counts what the engine's steps did, and sums up what its parts say of themselves. Decides nothing."""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

from loractl.adapters.reference import Digest
from loractl.server.engine.kv_cache import BlockPool
from loractl.server.engine.scheduler import Scheduler
from loractl.server.engine.sequence import Sequence
from loractl.server.engine.settings import EngineSettings
from loractl.server.engine.slots import AdapterSlots
from loractl.server.engine.stats import EngineCounters, EngineStats, StepRecord


@dataclass(slots=True)
class Totals:
    """What only the engine itself can count, since it started."""

    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_steps: int = 0
    num_contained_failures: int = 0
    num_nonfinite: int = 0
    num_out_of_memory: int = 0
    max_distinct_adapters_in_step: int = 0

    def book(self, chosen: Rows[tuple[Sequence, int]], *, seconds: float) -> StepRecord:
        """Add a step over (sequence, number of its tokens), which took `seconds`."""
        num_adapters = len({digest for sequence, _ in chosen for digest in sequence.digests})
        num_prefill = sum(number for sequence, number in chosen if sequence.num_computed <= sequence.num_prompt)
        self.num_steps += 1
        self.num_prompt_tokens += num_prefill
        self.max_distinct_adapters_in_step = max(self.max_distinct_adapters_in_step, num_adapters)
        return StepRecord(
            seconds=seconds,
            num_tokens=sum(number for _, number in chosen),
            num_prefill_tokens=num_prefill,
            num_requests=len(chosen),
            num_distinct_adapters=num_adapters,
        )


def snapshot(
    settings: EngineSettings,
    *,
    scheduler: Scheduler,
    blocks: BlockPool,
    slots: AdapterSlots,
    totals: Totals,
    num_quarantined_requests: int,
) -> EngineStats:
    """Sum up the engine as it is between two steps."""
    host_digests, host_bytes = slots.host()
    return EngineStats(
        waiting=dict(scheduler.wait_reasons),
        running=len(scheduler.running),
        kv_blocks_used=blocks.num_held,
        kv_blocks_total=blocks.num_blocks,
        kv_blocks_cached=blocks.num_kept,
        block_size=settings.block_size,
        num_slots=slots.num_slots,
        max_rank=slots.max_rank,
        slots=slots.slots(),
        host_digests=host_digests,
        host_bytes=host_bytes,
        host_limit_bytes=slots.host_limit_bytes,
        quarantined_adapters=slots.failures.quarantined(),
        num_quarantined_requests=num_quarantined_requests,
        running_adapters=_digests(scheduler.running),
        waiting_adapters=_digests(scheduler.waiting),
        counters=EngineCounters(
            num_prompt_tokens=totals.num_prompt_tokens,
            num_cached_tokens=scheduler.num_prefix_hits,
            num_generated_tokens=totals.num_generated_tokens,
            num_prefix_queries=scheduler.num_prefix_queries,
            num_prefix_hits=scheduler.num_prefix_hits,
            num_preemptions=scheduler.num_preemptions,
            num_adapter_loads=slots.num_loads,
            num_adapter_evictions=slots.num_evictions,
            num_adapter_load_failures=slots.num_failures,
            num_host_evictions=slots.num_host_evictions,
            num_host_hits=slots.num_host_hits,
            num_steps=totals.num_steps,
            num_contained_failures=totals.num_contained_failures,
            num_nonfinite=totals.num_nonfinite,
            num_out_of_memory=totals.num_out_of_memory,
            max_distinct_adapters_in_step=totals.max_distinct_adapters_in_step,
        ),
    )


def _digests(sequences: list[Sequence]) -> tuple[Digest, ...]:
    return tuple(dict.fromkeys(digest for sequence in sequences for digest in sequence.digests))
