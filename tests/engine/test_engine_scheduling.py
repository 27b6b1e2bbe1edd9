"""Whose turn it is, seen from outside: shares, weights, priorities, deadlines, and nobody waits for ever."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_drive import Drive, adapter_use
from loractl.adapters.errors import BadRequest, DeadlinePassed, Overloaded
from loractl.server.engine.base_model import BaseModel, load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.messages import AdapterUse, RequestId, Sampling, Submit
from loractl.server.engine.runner import Part
from loractl.server.engine.settings import EngineSettings
from tiny_models import make_adapter, make_tiny_base

SETTINGS = EngineSettings(
    num_slots=2, max_rank=4, max_running=4, block_size=4, kv_bytes=1 << 19, max_queue=400, max_overtakes=12
)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("turns") / "base", num_hidden_layers=1)


@pytest.fixture(scope="module")
def base(base_folder: Path) -> BaseModel:
    return load_base(base_folder, quantization="none", dtype="float32")


@pytest.fixture(scope="module")
def uses(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterUse]:
    root = tmp_path_factory.mktemp("adapters")
    folders = [make_adapter(base_folder, root / f"a{seed}", seed=seed) for seed in range(4)]
    return [adapter_use(folder) for folder in folders]


@pytest.fixture
def drive(base: BaseModel) -> Iterator[Drive]:
    """An engine whose arithmetic is left out: what is tested is the order."""
    engine = Engine(base, SETTINGS)

    def nothing(parts: Sequence[Part], chosen: torch.Tensor | None = None) -> torch.Tensor:
        del chosen
        return torch.zeros(sum(part.num_logits for part in parts), base.vocab_size)

    engine._runner.run = nothing  # type: ignore[method-assign]
    yield Drive(engine)
    engine.close()


def _submit(name: str, *uses: AdapterUse, num_tokens: int = 8, **fields: Any) -> Submit:
    sampling = Sampling(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    return Submit(id=RequestId(name), prompt=(5, 6, 7), sampling=sampling, adapters=uses, **fields)


def _order(drive: Drive) -> list[str]:
    """Names in the order in which they ended."""
    ended: list[str] = []
    for _ in range(20_000):
        drive.once()
        ended += [name for name, outcome in drive.outcomes.items() if outcome.ends and name not in ended]
        if len(ended) == len(drive.outcomes):
            return ended
    raise AssertionError("some never ended")


def test_light_tenant_is_served_at_once_in_a_heavy_ones_flood(drive: Drive) -> None:
    drive.submit(_submit(f"heavy{n}", tenant="heavy") for n in range(200))
    for _ in range(30):
        drive.once()
    drive.submit(_submit(f"light{n}", tenant="light") for n in range(4))
    order = _order(drive)
    before = order[: max(order.index(f"light{n}") for n in range(4))]
    since = [name for name in before if name.startswith("heavy")]
    started = 30 // 8 * SETTINGS.max_running + SETTINGS.max_running
    assert len(since) <= started + SETTINGS.max_running


def test_tenants_are_served_in_proportion_to_their_weights(drive: Drive) -> None:
    drive.submit(
        _submit(f"{tenant}{n}", tenant=tenant, weight=3.0 if tenant == "a" else 1.0)
        for n in range(80)
        for tenant in "ab"
    )
    order = _order(drive)
    served = Counter(name[0] for name in order[:80])
    assert served["a"] / served["b"] == pytest.approx(3.0, rel=0.25)


def test_many_adapters_of_a_tenant_take_no_share_of_anothers(drive: Drive, uses: list[AdapterUse]) -> None:
    drive.submit(_submit(f"many{n}", uses[n % 4], tenant="many") for n in range(60))
    drive.submit(_submit(f"one{n}", uses[0], tenant="one") for n in range(20))
    order = _order(drive)
    assert max(order.index(f"one{n}") for n in range(20)) < 60


def test_adapter_without_a_slot_is_passed_over_a_bounded_number_of_times(drive: Drive, uses: list[AdapterUse]) -> None:
    # Two adapters keep both slots busy; without a bound the third would wait until their flood is over.
    drive.submit(_submit(f"x{n}", uses[n % 2], num_tokens=4 + n % 3) for n in range(8))
    while not drive.outcomes[RequestId("x0")].tokens:
        drive.once()
    drive.submit([_submit("patient", uses[2], tenant="y")])
    drive.submit(_submit(f"x{n}", uses[n % 2], num_tokens=4 + n % 3) for n in range(8, 120))
    order = _order(drive)
    assert order.index("patient") <= 8 + SETTINGS.max_overtakes + 2 * SETTINGS.max_running


def test_higher_priority_starts_first_and_a_passed_deadline_fails_at_once(drive: Drive) -> None:
    drive.submit(_submit(f"running{n}", num_tokens=20) for n in range(4))
    drive.once()
    drive.submit(_submit(f"low{n}") for n in range(8))
    drive.submit([_submit("high", priority=5), _submit("late", deadline_s=time.monotonic() - 1)])
    order = _order(drive)
    assert order.index("late") == 0
    assert isinstance(drive.outcomes[RequestId("late")].failed.error, DeadlinePassed)
    assert order.index("high") <= 8  # it starts first of those that wait, and ends in the step of three others


def test_full_queue_answers_at_once_and_takes_requests_again_later(drive: Drive) -> None:
    with pytest.raises(Overloaded, match="queue is full"):
        drive.submit(_submit(f"r{n}", num_tokens=1) for n in range(SETTINGS.max_queue + SETTINGS.max_running + 1))
    del drive.outcomes[RequestId(f"r{SETTINGS.max_queue + SETTINGS.max_running}")]
    drive.until_ended()
    drive.submit([_submit("again")])
    drive.until_ended()


def test_more_adapters_than_slots_in_one_request_are_refused_at_the_door(drive: Drive, uses: list[AdapterUse]) -> None:
    with pytest.raises(BadRequest, match="3 adapters") as refused:
        drive.engine.submit(_submit("sum", *uses[:3]))
    assert refused.value.field == "adapters"


def test_failed_load_is_remembered_for_a_while_and_then_tried_again(
    drive: Drive, uses: list[AdapterUse], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr("loractl.server.engine.slots.time.monotonic", lambda: now)
    lost = AdapterUse(digest=uses[0].digest, folder=tmp_path / "link")
    drive.submit([_submit("a", lost), _submit("b", lost), _submit("base")])
    drive.until_ended()
    assert drive.outcomes[RequestId("a")].failed
    assert drive.outcomes[RequestId("base")].finished
    lost.folder.symlink_to(uses[0].folder)
    drive.submit([_submit("c", lost)])
    drive.until_ended()
    assert drive.outcomes[RequestId("c")].failed
    assert drive.engine.stats().counters.num_adapter_load_failures == 1  # one read for all three
    assert drive.engine.stats().quarantined_adapters == {"disk": 1}
    now += 0.6
    drive.submit([_submit("d", lost)])
    drive.until_ended()
    assert drive.outcomes[RequestId("d")].finished
    assert drive.engine.stats().quarantined_adapters == {}


def test_adapter_unloaded_while_it_runs_leaves_when_its_last_request_ends(drive: Drive, uses: list[AdapterUse]) -> None:
    drive.submit([_submit("a", uses[0], num_tokens=30)])
    while not drive.outcomes[RequestId("a")].tokens:
        drive.once()
    drive.engine.unload(uses[0].digest)
    drive.once()
    assert [slot.digest for slot in drive.engine.stats().slots] == [uses[0].digest]
    drive.until_ended()
    assert not drive.engine.stats().slots
    assert not drive.engine.stats().host_digests


def test_prefetched_adapter_is_read_before_a_request_needs_it(drive: Drive, uses: list[AdapterUse]) -> None:
    drive.engine.prefetch(uses[1])
    until = time.monotonic() + 30
    drive.once()
    while not drive.engine._slots.is_near(uses[1].digest):
        assert time.monotonic() < until
        time.sleep(0.01)
    drive.submit([_submit("a", uses[1], num_tokens=1)])
    drive.once()
    drive.once()
    assert drive.outcomes[RequestId("a")].finished
