"""What an operator decides about the engine. Knows no environment variables and no command line."""

from dataclasses import dataclass

from loractl.adapters.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Sizes and policies of one engine; raises UsageError for values that cannot be meant."""

    num_slots: int | None = None
    """Adapters that can be resident on the device at once; None: sized from the memory there is, up to 32."""
    max_rank: int = 64
    """Highest LoRA rank that a slot holds."""
    truncate_rank: bool = False
    """Serve an adapter above `max_rank` by its best approximation (SVD) instead of refusing it."""
    max_distinct_adapters: int | None = None
    """Adapters that may share one step; None: as many as there are slots."""
    max_batch_tokens: int = 512
    """Tokens of one step: decoding rows first, then chunks of prompts."""
    max_running: int = 64
    """Sequences that decode at once."""
    block_size: int = 16
    """Token positions in one KV block."""
    kv_bytes: int | None = None
    """Memory for KV blocks; None: sized from the memory there is."""
    memory_fraction: float = 0.5
    """Share of the free memory that automatic sizing may take for slots and KV."""
    max_model_len: int | None = None
    """Longest sequence, prompt and output together; None: what the base was trained for."""
    prefix_cache: bool = True
    run_ahead: bool | None = None
    """Launch a step before the tokens of the one before are read; None: on a card, for elsewhere both use one
    processor."""
    max_queue: int = 1024
    """Requests that may wait; the next one is refused at once."""
    host_cache_bytes: int | None = None
    """Adapters kept ready in host memory, beyond those in slots; None: sized from the memory there is, up to 2 GiB."""
    num_loaders: int = 1
    """Threads that read adapters from disk."""
    load_timeout_s: float = 60.0
    """How long a request waits for its adapter before it fails."""
    max_overtakes: int = 64
    """How often a waiting request may be passed over by ones whose turn comes later; then they wait for it."""

    def __post_init__(self) -> None:
        for name in ("num_slots", "max_rank", "max_batch_tokens", "max_running", "block_size", "num_loaders"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        for name in ("max_queue", "host_cache_bytes", "max_overtakes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"{name} must not be negative")
        if self.max_batch_tokens < self.max_running:
            raise UsageError(
                f"max_batch_tokens ({self.max_batch_tokens}) is below max_running ({self.max_running})",
                hint="every running sequence takes one token of a step",
            )
