"""Puts one server together from an operator's choices: base, engine, adapters, hub."""

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loractl.adapters.base_identity import cache_folder, identify_base
from loractl.adapters.base_loading import Dtype
from loractl.adapters.base_source import BaseSource, resolve_base
from loractl.adapters.digest import folder_digest
from loractl.adapters.errors import UsageError
from loractl.adapters.local_cache import AdapterCache
from loractl.adapters.manifest import Quantization
from loractl.server.access import Access, Key
from loractl.server.bridge import Bridge, BridgeLimits, EngineLike
from loractl.server.engine.settings import EngineSettings
from loractl.server.fetch.from_hub import FromHub
from loractl.server.fetch.hub_events import HubEvents
from loractl.server.fetch.hub_reader import HubReader
from loractl.server.fetch.source import AdapterSource, Found
from loractl.server.hub_callers import HubCallers
from loractl.server.metrics import ServerMetrics
from loractl.server.prompts import Prompts
from loractl.server.serving import Serving, ServingSettings
from loractl.server.tracing import Tracing


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What the command line says, checked but not yet acted on."""

    base: str
    base_name: str | None = None
    hub_url: str | None = None
    hub_token: str | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict[str, Path])
    host: str = "127.0.0.1"
    insecure: bool = False
    keys_file: Path | None = None
    keys_from_hub: bool = False
    adapter_limits: Key | None = None
    quantization: Quantization = "int8"
    dtype: Dtype = "auto"
    engine: EngineSettings = field(default_factory=EngineSettings)
    max_step_s: float = 30.0
    cache_folder: Path | None = None
    cache_bytes: int | None = None
    drain_timeout_s: float = 300.0
    drain_grace_s: float = 0.0
    max_adapter_labels: int = 200
    vllm_metrics: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """Choices that hold together: files found, keys read; no weight is loaded yet."""

    choices: Choices
    source: BaseSource
    fingerprint: str
    access: Access
    local: Mapping[str, Found]
    tracing: Tracing | None = None

    @property
    def base_name(self) -> str:
        return self.choices.base_name or self.source.id


def check(choices: Choices) -> Checked:
    """Find and read everything small. Raises UsageError, NotFound, BadData ... before anything slow begins."""
    if choices.keys_from_hub and choices.hub_url is None:
        raise UsageError("--keys-from-hub needs a hub", hint="give --hub URL")
    callers = HubCallers(choices.hub_url) if choices.keys_from_hub and choices.hub_url else None
    file = choices.keys_file
    access = Access.from_file(file, callers=callers) if file is not None else Access(callers=callers)
    if access.is_open and not choices.insecure and not _is_loopback(choices.host):
        raise UsageError(
            f"--host {choices.host} would let everybody who can reach this machine use it",
            hint="give --api-keys FILE or --keys-from-hub, or --insecure if something in front checks who asks",
        )
    source = resolve_base(choices.base)
    local = {
        name: Found(name=name, digest=folder_digest(folder), folder=folder) for name, folder in choices.adapters.items()
    }
    fingerprint = identify_base(source.folder, base_id=source.id).fingerprint
    return Checked(
        choices=choices,
        source=source,
        fingerprint=fingerprint,
        access=access,
        local=local,
        tracing=Tracing.from_environment(),
    )


def assemble(
    checked: Checked,
    *,
    make_engine: Callable[[], EngineLike],
    prompts: Prompts,
    dtype: str | None = None,
    targets: Sequence[str] = (),
) -> Serving:
    """Build a server around an engine; `make_engine` is called in the engine's own thread.

    `dtype` and `targets` are what the base computes in and which of its layers adapters reach, for who asks.
    """
    choices = checked.choices
    metrics = ServerMetrics(max_adapter_labels=choices.max_adapter_labels)
    hub = cache = events = None
    if choices.hub_url is not None:
        folder = choices.cache_folder or cache_folder() / "adapters"
        cache = AdapterCache(folder, max_bytes=choices.cache_bytes, on_stage=metrics.saw_cache_stage)
        reader = HubReader(choices.hub_url, token=choices.hub_token, cache=cache)
        hub = FromHub(reader, on_call=metrics.saw_hub_call)
        events = HubEvents(hub.names, choices.hub_url, token=choices.hub_token)
    settings = ServingSettings(
        base_name=checked.base_name,
        base_fingerprint=checked.fingerprint,
        quantization=choices.quantization,
        dtype=dtype,
        targets=tuple(targets),
        adapter_limits=choices.adapter_limits,
        vllm_metrics=choices.vllm_metrics,
        drain_timeout_s=choices.drain_timeout_s,
        drain_grace_s=choices.drain_grace_s,
    )
    return Serving(
        settings=settings,
        bridge=Bridge(
            make_engine,
            limits=BridgeLimits(stall_s=choices.max_step_s / 3, hang_s=choices.max_step_s),
            on_step=metrics.saw_step,
            on_load=metrics.saw_load,
        ),
        source=AdapterSource(local=checked.local, hub=hub, base_fingerprint=checked.fingerprint),
        hub_events=events,
        prompts=prompts,
        metrics=metrics,
        access=checked.access,
        tracing=checked.tracing,
        disk=cache,
    )


def load(checked: Checked) -> Serving:
    """Load the base and put the real engine around it; takes seconds to minutes."""
    from loractl.adapters.training.targets import linear_names
    from loractl.server.engine.base_model import load_base
    from loractl.server.engine.engine import Engine
    from loractl.server.engine.sizing import choose_size

    choices = checked.choices
    base = load_base(
        checked.source.folder, quantization=choices.quantization, dtype=choices.dtype, base_id=checked.source.id
    )
    size = choose_size(base, choices.engine)  # once: an engine that is built anew finds the memory of the old one taken
    return assemble(
        checked,
        make_engine=lambda: Engine(base, choices.engine, size=size),
        prompts=Prompts(base.tokenizer),
        dtype=str(base.model.dtype).removeprefix("torch."),
        targets=sorted(linear_names(base.model)),
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
