"""The parts of one running server, held together, and its own life: ready, draining, gone. No HTTP here."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loractl.adapters.errors import ContextExceeded, Draining, NotFound, RepoNotFound
from loractl.adapters.local_cache import AdapterCache
from loractl.adapters.reference import Digest
from loractl.server.access import Access, Key
from loractl.server.bridge import Bridge
from loractl.server.engine.messages import Submit
from loractl.server.engine_metrics import Snapshot
from loractl.server.fetch.hub_events import HubEvents
from loractl.server.fetch.source import AdapterSource, Found
from loractl.server.generation import Caller, Limits, ServedAdapter
from loractl.server.metrics import TIERS, ServerMetrics, Tier
from loractl.server.openai_wire import Common, EmbeddingRequest
from loractl.server.prompts import Prompts
from loractl.server.quota import Quotas
from loractl.server.tracing import RequestTrace, Tracing
from loractl.server.watch import Watch


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingSettings:
    """What an operator decides about the HTTP side; the engine's own settings are `EngineSettings`."""

    base_name: str
    """Under which the bare base is asked for."""
    base_fingerprint: str
    quantization: str = "none"
    dtype: str | None = None
    """What the base computes in."""
    targets: tuple[str, ...] = ()
    """Names of the base's layers that adapters may reach."""
    max_tokens: int | None = None
    max_prompt_tokens: int | None = None
    max_body_bytes: int = 4 << 20
    header_timeout_s: float = 15.0
    """A client that has not sent its headers by then is cut off."""
    body_timeout_s: float = 30.0
    request_timeout_s: float | None = 600.0
    """A request that has not started by then fails."""
    write_timeout_s: float = 30.0
    """A reader that takes no chunk for this long is cut off."""
    adapter_limits: Key | None = None
    """Requests and tokens a minute, and requests at a time, of each adapter over all keys."""
    vllm_metrics: bool = False
    """Whether metrics are told by vLLM's names too."""
    drain_timeout_s: float = 300.0
    drain_grace_s: float = 0.0
    """How long a draining server still answers 503 before the listener closes, for balancers to notice."""


class Serving:
    """One server without its HTTP: everything that routes need."""

    def __init__(
        self,
        *,
        settings: ServingSettings,
        bridge: Bridge,
        source: AdapterSource,
        prompts: Prompts,
        metrics: ServerMetrics,
        access: Access | None = None,
        hub_events: HubEvents | None = None,
        tracing: Tracing | None = None,
        disk: AdapterCache | None = None,
    ) -> None:
        self.settings = settings
        self.bridge = bridge
        self.source = source
        self.hub_events = hub_events
        self.disk = disk
        self.prompts = prompts
        self.metrics = metrics
        self.tracing = tracing
        self.access = access or Access()
        self.quotas = Quotas()
        self.started_at = int(time.time())
        self.is_draining = False
        self.num_requests = 0
        """HTTP requests that generate now."""

    @property
    def is_ready(self) -> bool:
        return self.bridge.is_ready and not self.is_draining

    @property
    def limits(self) -> Limits:
        return Limits(
            max_model_len=self.bridge.engine.max_model_len,
            max_tokens=self.settings.max_tokens,
            max_prompt_tokens=self.settings.max_prompt_tokens,
            vocab_size=self.prompts.vocab_size,
        )

    def check_open(self) -> None:
        """Raise Draining when this server takes no new requests."""
        if self.is_draining:
            self.metrics.rejected.labels("draining").inc()
            raise Draining("this server is shutting down", hint="another replica will answer", retry_after_s=5)

    async def find(self, name: str, key: Key, *, caller: str | None = None) -> Found:
        """The adapter of this name; for a key that may not use it, there is no such adapter."""
        repo_id = name if name in self.source.local else name.partition("@")[0]
        if not await self.access.may_use(key, repo_id):
            raise RepoNotFound(f"no adapter {name[:200]} in the hub", field="model")
        return await self.source.find(name, caller=caller)

    async def adapters_of(self, request: Common | EmbeddingRequest, key: Key) -> tuple[ServedAdapter, ...]:
        """The adapters that a request names, on the local disk, and on their way to the device."""
        # A caller is a key, or one of the people that a key tells apart; canaries stay with each.
        caller = f"{key.tenant}\0{request.user or ''}"
        if request.adapters is not None:
            named = [(each.name, each.weight) for each in request.adapters]
            found = [self._served(await self.find(name, key, caller=caller), weight=weight) for name, weight in named]
        elif request.model == self.settings.base_name:
            return ()
        else:
            found = [self._served(await self.find(request.model, key, caller=caller))]
        for adapter in found:
            self.metrics.saw_tier(adapter.tier)
            self.metrics.name_adapter(adapter.found.digest, adapter.found.name)
            self.bridge.engine.prefetch(adapter.use)
        return tuple(found)

    def _served(self, found: Found, *, weight: float = 1.0) -> ServedAdapter:
        stats = self.bridge.stats
        tier: Tier = "hit_disk" if found.from_disk else "miss"
        if any(slot.digest == found.digest and not slot.loading for slot in stats.slots):
            tier = "hit_gpu"
        elif found.digest in stats.host_digests:
            tier = "hit_host"
        return ServedAdapter(found=found, weight=weight, tier=tier)

    def check_length(self, num_chars: int, *, field: str) -> None:
        """Raise ContextExceeded for a text that no window of tokens can hold, before seconds go into tokenizing it."""
        window = self.bridge.engine.max_model_len
        if num_chars > window * self.prompts.longest_token_chars:
            raise ContextExceeded(
                f"the prompt has {num_chars} characters, more than {window} tokens can hold",
                hint=f"this model's window is {window} tokens, prompt and output together",
                field=field,
            )

    def bookings(self, adapters: Sequence[ServedAdapter]) -> list[Key]:
        """The adapters of a request as quotas see them; none where no adapter has limits."""
        limits = self.settings.adapter_limits
        if limits is None:
            return []
        names = dict.fromkeys(adapter.found.repo_id or adapter.found.name for adapter in adapters)
        return [replace(limits, tenant=f"adapter:{name}", what=f"the adapter {name}") for name in names]

    def caller(self, key: Key) -> Caller:
        return Caller(tenant=key.tenant, weight=key.weight, max_priority=100 if key.is_admin else 0)

    def deadline_s(self) -> float | None:
        timeout_s = self.settings.request_timeout_s
        return None if timeout_s is None else time.monotonic() + timeout_s

    def open(
        self,
        submits: Sequence[Submit],
        *,
        adapters: Sequence[ServedAdapter],
        is_stream: bool,
        trace: RequestTrace | None = None,
    ) -> Watch:
        """Queue the sequences and watch them for the metrics."""
        ticket = self.bridge.open(submits)
        names = [adapter.found.name for adapter in adapters] or [self.settings.base_name]
        tiers = {adapter.tier for adapter in adapters}
        farthest: Tier | None = next((tier for tier in reversed(TIERS) if tier in tiers), None)
        tracks = [
            self.metrics.track_labels(found.name, found.version or found.digest[:19], found.track)
            for found in (adapter.found for adapter in adapters)
            if found.track is not None
        ]
        return Watch(
            ticket, self.metrics, adapters=names, is_stream=is_stream, tracks=tracks, tier=farthest, trace=trace
        )

    def digest_of(self, name: str) -> Digest:
        """The digest that a name was last used with; raises NotFound."""
        for digest, known in reversed(self.metrics.names.items()):
            if name in {known, digest}:
                return digest
        raise NotFound(f"no adapter {name[:200]!r} has been used here", field="name")

    def snapshot(self) -> Snapshot:
        """One moment of everything that metrics show."""
        bridge, settings = self.bridge, self.settings
        stats = bridge.stats
        hub_is_up = self.source.hub_is_up
        gauges = [
            ("ready", "1 when a request would be served.", float(self.is_ready)),
            ("draining", "1 when the server finishes and takes nothing new.", float(self.is_draining)),
            ("engine_up", "1 when the engine steps.", float(bridge.is_ready)),
            ("open_streams", "Requests that generate now.", float(self.num_requests)),
            ("engine_last_step_timestamp_seconds", "When the last step ended.", bridge.last_step_at or 0.0),
        ]
        if hub_is_up is not None:
            gauges.append(("hub_up", "1 while the hub answers.", float(hub_is_up)))
        counters = [
            ("engine_restarts", "Engines built anew after a failure.", float(bridge.num_restarts)),
            ("watchdog_stalls", "Steps that ran too long.", float(bridge.num_hangs)),
            ("adapter_label_overflow", "Uses counted as other.", float(self.metrics.labels.num_overflows)),
        ]
        config = {
            "base_model": settings.base_name,
            "quant": settings.quantization,
            "max_model_len": str(bridge.max_model_len),
            "gpu_slots": str(stats.num_slots),
            "max_rank": str(stats.max_rank),
        }
        return Snapshot(
            stats=stats,
            names=self.metrics.names,
            config=config,
            gauges=gauges,
            counters=counters,
            device_memory=bridge.device_memory,
        )

    async def drain(self) -> None:
        """Take nothing new; return when what runs has ended, or the timeout has, with the rest cut off by an error."""
        self.is_draining = True
        deadline = time.monotonic() + self.settings.drain_timeout_s
        grace_until = time.monotonic() + self.settings.drain_grace_s
        while time.monotonic() < deadline:
            if not (self.num_requests or self.bridge.num_open) and time.monotonic() >= grace_until:
                return
            await asyncio.sleep(0.02)
        self.bridge.fail_all(Draining("the server shut down before this answer was complete", retry_after_s=5))
        await asyncio.sleep(0.2)
