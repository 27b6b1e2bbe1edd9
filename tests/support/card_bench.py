"""What all figures of a card share: sizes, models, adapters, clocks, and how one is written down."""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from card_models import Shape, as_base, make_model, write_adapter
from loractl.adapters.errors import LoractlError
from loractl.adapters.manifest import Quantization
from loractl.server.engine.engine import Engine
from loractl.server.engine.measure import Burst, Work, burst, uses_of
from loractl.server.engine.messages import AdapterUse
from loractl.server.engine.settings import EngineSettings

Uses = Sequence[tuple[AdapterUse, ...]]
EXPECTED = (RuntimeError, ValueError, TypeError, AttributeError, ImportError, KeyError, OSError, LoractlError)
"""What may end a section of the bench without ending the bench."""


@dataclass(slots=True)
class Bench:
    """What the sections share: the device, the sizes, where files go, and when to stop."""

    device: torch.device
    folder: Path
    ends_at: float
    llama: Shape
    packed: Shape
    num_requests: int
    num_adapters: int
    num_registered: int
    rank: int
    prompt_tokens: int
    short_prompt_tokens: int
    output_tokens: int
    num_runs: int
    train_tokens: int
    kv_bytes: int
    dtype: torch.dtype
    adapters: dict[str, list[Path]] = field(default_factory=dict[str, list[Path]])

    @property
    def is_card(self) -> bool:
        return self.device.type == "cuda"

    def work(self, num_requests: int | None = None, *, is_short: bool = False, output_tokens: int = 0) -> Work:
        prompt = self.short_prompt_tokens if is_short else self.prompt_tokens
        return Work(
            num_requests=num_requests or self.num_requests,
            num_prompt_tokens=prompt,
            num_output_tokens=output_tokens or self.output_tokens,
        )

    def uses(self, shape: Shape, count: int, *, rank: int = 0, leaves: tuple[str, ...] = ()) -> Uses:
        """Distinct adapters of a shape, written once."""
        rank = rank or self.rank
        made = self.adapters.setdefault(f"{shape.name} {rank} {leaves}", [])
        for index in range(len(made), count):
            where = self.folder / f"{shape.name.replace(' ', '-')}-{rank}-{len(leaves)}-{index}"
            made.append(write_adapter(where, shape, rank=rank, seed=index, leaves=leaves))
        return uses_of(made[:count])

    def engine(self, model: Any, quantization: Quantization, *, num_slots: int, rank: int = 0) -> Engine:
        settings = EngineSettings(
            num_slots=num_slots,
            max_rank=rank or self.rank,
            max_running=self.num_requests,
            max_queue=4096,
            max_batch_tokens=max(2048 if self.is_card else 64, self.num_requests),
            prefix_cache=False,
            kv_bytes=self.kv_bytes,
            host_cache_bytes=48 << 30 if self.is_card else 1 << 28,
            num_loaders=4 if self.is_card else 1,
        )
        return Engine(as_base(model, quantization=quantization), settings)

    def model(self, shape: Shape, quantization: Quantization) -> Any:
        return make_model(shape, device=self.device, dtype=self.dtype, quantization=quantization)

    def wait(self) -> None:
        if self.is_card:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give memory of models that are gone back, and forget the highest mark."""
        gc.collect()
        if self.is_card:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        return int(torch.cuda.max_memory_allocated()) if self.is_card else None

    def seconds(self, call: Callable[[], Any], *, repeat: int) -> float:
        """The median time of a call, the device's work included."""
        call()
        times = []
        for _ in range(repeat):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def figure(name: str, ours: float | None, other: float | None, aim: str, note: str = "") -> dict[str, Any]:
    """One row: the ratio of two numbers, beside what it should be."""
    ratio = round(ours / other, 3) if ours is not None and other else None
    met = None if ratio is None else (ratio >= float(aim[3:]) if aim.startswith(">=") else ratio <= float(aim[3:]))
    return {"figure": name, "ours": ours, "other": other, "ratio": ratio, "aim": aim, "met": met, "note": note}


def median_burst(bench: Bench, engine: Engine, uses: Uses, work: Work) -> Burst:
    """The burst of median rate, after a short one that loads and compiles what it needs."""
    burst(engine, uses, dataclasses.replace(work, num_output_tokens=2))
    found = sorted((burst(engine, uses, work) for _ in range(bench.num_runs)), key=lambda one: one.rate)
    return found[len(found) // 2]


def decode_rate(engine: Engine, uses: Uses, work: Work, bench: Bench) -> float:
    """Tokens per second of steps in which every request decodes."""
    found = median_burst(bench, engine, uses, work)
    return round(work.num_requests / found.decode_s, 1) if found.decode_s else round(found.rate, 1)


def copy_bytes_per_s(bench: Bench) -> float:
    """What the device copies, bytes read and bytes written together."""
    source = torch.randint(0, 255, ((2 << 30) if bench.is_card else (1 << 24),), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / bench.seconds(lambda: target.copy_(source), repeat=10)
