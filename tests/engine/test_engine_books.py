"""Whatever comes in whatever order, every block and slot is accounted for, and each request ends exactly once."""

import dataclasses
import os
import time
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine_drive import adapter_use
from loractl.adapters.errors import LoractlError
from loractl.adapters.reference import Digest
from loractl.server.engine.base_model import BaseModel, load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.messages import AdapterUse, Cancel, Failed, Finished, RequestId, Sampling, Submit
from loractl.server.engine.runner import Part
from loractl.server.engine.settings import EngineSettings
from tiny_models import make_adapter, make_tiny_base

LONG = os.environ.get("LORACTL_DRILLS") == "long"
POISON = 383
SETTINGS = EngineSettings(
    num_slots=3,
    max_rank=4,
    max_running=4,
    max_batch_tokens=12,
    block_size=4,
    kv_bytes=14 * 4 * 2 * 8 * 2 * 4,  # 14 blocks of this base: four sequences cannot all grow to their ends
    max_queue=8,
    max_overtakes=2,
    host_cache_bytes=40_000,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = make_tiny_base(tmp_path_factory.mktemp("books") / "base", num_hidden_layers=1)
    return load_base(folder, quantization="none", dtype="float32")


@pytest.fixture(scope="module")
def uses(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterUse]:
    root = tmp_path_factory.mktemp("adapters")
    folder = make_tiny_base(root / "base", num_hidden_layers=1)
    folders = [make_adapter(folder, root / f"a{seed}", seed=seed) for seed in range(5)]
    there = [adapter_use(each) for each in folders]
    return [*there, AdapterUse(digest=Digest("sha256:" + "0" * 64), folder=root / "gone")]


class Traffic(RuleBasedStateMachine):
    """One engine under random traffic; the model's arithmetic is left out, its books are not."""

    base: BaseModel
    uses: list[AdapterUse]

    def __init__(self) -> None:
        super().__init__()
        self.ends: dict[RequestId, int] = {}
        self.pinned: set[Digest] = set()

    @initialize(run_ahead=st.booleans())
    def start(self, run_ahead: bool) -> None:
        self.engine = Engine(self.base, dataclasses.replace(SETTINGS, run_ahead=run_ahead))
        self.engine._runner.run = self._compute  # type: ignore[method-assign]

    def _compute(self, parts: Sequence[Part], chosen: torch.Tensor | None = None) -> torch.Tensor:
        if any(POISON in part.tokens for part in parts):
            raise RuntimeError("poison")
        last = [part.tokens[-1] if chosen is None else int(chosen[part.source or 0]) for part in parts]
        rows = [
            token * 7 + part.length for token, part in zip(last, parts, strict=True) for _ in range(part.num_logits)
        ]
        logits = torch.zeros(len(rows), self.base.vocab_size)
        logits[torch.arange(len(rows)), torch.tensor(rows, dtype=torch.long) % 300] = 1.0
        return logits

    @rule(
        chosen=st.lists(st.integers(0, 5), max_size=2, unique=True),
        prompt=st.one_of(
            st.integers(1, 40).map(lambda length: list(range(10, 10 + length))),  # shares its beginning with others
            st.lists(st.integers(0, 300), min_size=1, max_size=30),
            st.just([5, POISON, 6]),
        ),
        tenant=st.sampled_from(["", "a", "b"]),
        priority=st.integers(0, 1),
        max_tokens=st.integers(1, 30),
        is_late=st.booleans(),
    )
    def submit(
        self, chosen: list[int], prompt: list[int], tenant: str, priority: int, max_tokens: int, is_late: bool
    ) -> None:
        request = Submit(
            id=RequestId(f"r{len(self.ends)}"),
            prompt=tuple(prompt),
            sampling=Sampling(max_tokens=max_tokens, temperature=0.0, num_prompt_logprobs=0 if priority else None),
            adapters=tuple(self.uses[number] for number in chosen),
            tenant=tenant,
            weight=2.0 if tenant == "a" else 1.0,
            priority=priority,
            deadline_s=time.monotonic() + (0.0 if is_late else 60.0),
        )
        try:
            self.engine.submit(request)
        except LoractlError:
            return  # refused at the door: no event follows
        self.ends[request.id] = 0

    @precondition(lambda self: self.ends)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.engine.cancel(Cancel(id=data.draw(st.sampled_from(sorted(self.ends)))))

    @rule(number=st.integers(0, 5), what=st.sampled_from(["unload", "prefetch", "pin", "unpin"]))
    def handle_adapter(self, number: int, what: str) -> None:
        use = self.uses[number]
        if what == "unload":
            self.engine.unload(use.digest)
        elif what == "prefetch":
            self.engine.prefetch(use)
        elif what == "unpin":
            self.engine.unpin(use.digest)
            self.pinned.discard(use.digest)
        else:
            try:
                self.engine.pin(use.digest)
            except LoractlError:
                return
            self.pinned.add(use.digest)

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self._step()

    def _step(self) -> None:
        for event in self.engine.step().events:
            assert self.ends[event.id] == 0, f"{event} after the end"
            if isinstance(event, Finished | Failed):
                self.ends[event.id] += 1
        self.engine.check_books()

    @invariant()
    def slots_are_never_all_pinned(self) -> None:
        stats = self.engine.stats()
        assert sum(slot.pinned for slot in stats.slots) < stats.num_slots

    def teardown(self) -> None:
        for use in self.uses:
            self.engine.unpin(use.digest)
        until = time.monotonic() + 30
        while not all(self.ends.values()):
            assert time.monotonic() < until, f"never ended: {self.engine.stats()}"
            self._step()
        assert set(self.ends.values()) <= {1}
        stats = self.engine.stats()
        assert (stats.running, stats.kv_blocks_used) == (0, 0)
        assert not any(slot.num_running for slot in stats.slots)
        self.engine.close()


@pytest.mark.drill
@pytest.mark.slow
def test_books_balance_under_random_traffic(base: BaseModel, uses: list[AdapterUse]) -> None:
    Traffic.base, Traffic.uses = base, uses
    run_state_machine_as_test(
        Traffic,
        settings=settings(
            max_examples=400 if LONG else 25,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
        ),
    )
