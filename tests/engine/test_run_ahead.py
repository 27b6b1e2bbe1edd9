"""Steps launched before the tokens of the one before are read: same tokens, one end each, books that balance."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_drive import Drive, Outcome, adapter_use
from loractl.adapters.errors import EngineFailure
from loractl.server.engine.base_model import BaseModel, load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.messages import AdapterUse, Cancel, Constraint, RequestId, Sampling, Submit
from loractl.server.engine.row_choice import Picks, pick_rows
from loractl.server.engine.runner import Part
from loractl.server.engine.settings import EngineSettings
from tiny_models import make_adapter, make_tiny_base

SETTINGS = EngineSettings(
    num_slots=2, max_rank=8, max_running=6, block_size=4, kv_bytes=1 << 20, max_batch_tokens=16, run_ahead=True
)
TIGHT_KV_BYTES = 18 * 4 * 2 * 2 * 8 * 2 * 4
"""18 blocks of this base: not all of a crowd can grow to their ends."""


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("ahead") / "base")


@pytest.fixture(scope="module")
def base(base_folder: Path) -> BaseModel:
    return load_base(base_folder, quantization="none", dtype="float32")


@pytest.fixture(scope="module")
def uses(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterUse]:
    root = tmp_path_factory.mktemp("adapters")
    folders = [make_adapter(base_folder, root / f"a{seed}", seed=seed) for seed in range(3)]
    return [adapter_use(folder) for folder in folders]


@pytest.fixture
def drive(base: BaseModel) -> Iterator[Drive]:
    drive = Drive(Engine(base, SETTINGS))
    yield drive
    drive.engine.check_books()
    drive.engine.close()


def _submit(name: str, *uses: AdapterUse, start: int = 5, **sampling: Any) -> Submit:
    given: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    prompt = tuple(range(start, start + 6))
    return Submit(id=RequestId(name), prompt=prompt, adapters=uses, sampling=Sampling(**(given | sampling)))


def _num_ahead(drive: Drive) -> int:
    return drive.engine._ahead.num_ahead


def _until_flying(drive: Drive) -> None:
    while not (drive.engine._ahead.is_flying and all(outcome.tokens for outcome in drive.outcomes.values())):
        drive.once()


def _told(outcome: Outcome) -> tuple[object, ...]:
    end = outcome.finished
    return outcome.ids, outcome.text, end.reason, end.stop_reason, end.num_output_tokens


def _crowd(uses: list[AdapterUse], stop_id: int, stop: str) -> list[Submit]:
    """Ends of every kind at different steps; more adapters than slots."""
    return [
        _submit("plain", max_tokens=30),
        _submit("adapter", uses[0], start=40, max_tokens=17),
        _submit("seeded", uses[1], start=80, temperature=1.5, seed=3, max_tokens=25),
        _submit("filtered", start=80, temperature=1.2, top_p=0.9, top_k=40, seed=4),
        _submit("stop id", start=120, stop_token_ids=(stop_id,), max_tokens=30),
        _submit("stop text", start=120, stop=(stop,), max_tokens=30),
        _submit("held", start=120, stop_token_ids=(stop_id,), min_tokens=9, max_tokens=30),
        _submit("summed", uses[0], replace(uses[2], weight=0.5), start=160),
        _submit("short", uses[2], max_tokens=1),
        _submit("scored", start=7, num_logprobs=1, max_tokens=4),
        _submit("biased", start=9, logit_bias={77: 2.0}, repetition_penalty=1.2, max_tokens=5),
        _submit("last", uses[2], start=30, max_tokens=20),
    ]


@pytest.mark.parametrize("kv_bytes", [1 << 20, TIGHT_KV_BYTES], ids=["roomy", "tight"])
def test_every_request_ends_as_it_does_one_step_at_a_time(
    base: BaseModel, uses: list[AdapterUse], kv_bytes: int
) -> None:
    found: list[dict[str, tuple[object, ...]]] = []
    stop_id, stop = 0, "-"
    for run_ahead in (False, True):
        drive = Drive(Engine(base, replace(SETTINGS, run_ahead=run_ahead, kv_bytes=kv_bytes)))
        drive.engine._next_tokens._on_device = True  # so that both draw alike
        if not run_ahead:
            drive.submit([_submit("whole", start=120, max_tokens=30)])
            drive.until_ended()
            whole = drive.outcomes.pop(RequestId("whole"))
            stop_id, stop = whole.ids[6], whole.text[12:15]
        crowd = _crowd(uses, stop_id, stop)
        drive.submit(crowd[:7])
        for _ in range(6):
            drive.once()
        drive.submit(crowd[7:])  # these come while steps fly
        drive.until_ended()
        assert (_num_ahead(drive) > 0) == run_ahead
        assert (drive.engine.stats().counters.num_preemptions > 0) == (kv_bytes == TIGHT_KV_BYTES)
        found.append({name: _told(outcome) for name, outcome in drive.outcomes.items()})
        drive.engine.close()
    assert found[0] == found[1]
    assert [found[1][name][2] for name in ("stop id", "stop text")] == ["stop"] * 2


def test_steps_that_only_decode_all_run_ahead_but_the_first(drive: Drive) -> None:
    drive.submit([_submit("one", max_tokens=10), _submit("two", start=40, max_tokens=20)])
    drive.until_ended()
    assert _num_ahead(drive) == 19
    assert [record.num_requests for record in drive.records] == [2] * 10 + [1] * 10
    assert drive.engine.stats().counters.num_generated_tokens == 30


@pytest.mark.parametrize(
    "asked",
    [
        {"num_logprobs": 0},
        {"repetition_penalty": 1.1},
        {"min_tokens": 8, "max_tokens": 8},
        {"constraint": Constraint(kind="regex", value="[ab]{6}")},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_the_host_decides_is_waited_for(drive: Drive, asked: dict[str, Any]) -> None:
    drive.submit([_submit("asked", **asked)])
    drive.until_ended()
    assert drive.outcomes[RequestId("asked")].finished
    assert _num_ahead(drive) == 0


def test_cancelled_request_ends_at_once_and_its_neighbour_goes_on(drive: Drive, uses: list[AdapterUse]) -> None:
    drive.submit([_submit("expected", uses[1])])
    drive.until_ended()
    drive.submit([_submit("gone", uses[0], max_tokens=100), _submit("stays", uses[1])])
    _until_flying(drive)
    drive.engine.cancel(Cancel(id=RequestId("gone")))
    drive.once()
    assert drive.outcomes[RequestId("gone")].finished.reason == "cancelled"
    drive.engine.unload(uses[0].digest)
    drive.until_ended()
    assert drive.outcomes[RequestId("stays")].ids == drive.outcomes[RequestId("expected")].ids
    assert [slot.digest for slot in drive.engine.stats().slots] == [uses[1].digest]


def test_step_that_was_launched_in_vain_is_brought_in_and_counts_for_nothing(drive: Drive) -> None:
    drive.submit([_submit("whole")])
    drive.until_ended()
    ids = drive.outcomes[RequestId("whole")].ids
    stop_id = next(token for token in ids[2:] if token not in ids[:2])
    drive.submit([_submit("stopped", stop_token_ids=(stop_id,))])
    drive.until_ended()
    assert drive.outcomes[RequestId("stopped")].finished.stop_reason == stop_id
    assert drive.engine._ahead.is_flying
    num_steps = drive.engine.stats().counters.num_steps
    drive.once()  # there is something to do, though no request is open
    assert not drive.engine.wait_for_work(0.0)
    assert drive.engine.stats().counters.num_steps == num_steps
    assert drive.engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize("is_lasting", [False, True])
def test_step_that_breaks_ahead_ends_only_the_request_that_breaks_it(
    drive: Drive, uses: list[AdapterUse], monkeypatch: pytest.MonkeyPatch, is_lasting: bool
) -> None:
    crowd = [_submit(f"r{n}", *uses[: n == 2], start=5 + 20 * n, temperature=1.0, seed=n) for n in range(4)]
    drive.submit(crowd)
    drive.until_ended()
    expected = [drive.outcomes.pop(submit.id).ids for submit in crowd]
    run, faults_ahead = drive.engine._runner.run, 0

    def breaks(parts: Sequence[Part], chosen: torch.Tensor | None = None) -> torch.Tensor:
        nonlocal faults_ahead
        if any(part.length == 11 and part.slots for part in parts) and (is_lasting or chosen is not None):
            faults_ahead += chosen is not None
            raise RuntimeError("a kernel")
        return run(parts, chosen)

    monkeypatch.setattr(drive.engine._runner, "run", breaks)
    drive.submit(crowd)
    drive.until_ended()
    assert faults_ahead == 1
    if is_lasting:
        assert isinstance(drive.outcomes[crowd[2].id].failed.error, EngineFailure)
        expected[2] = expected[2][:5]
    assert [drive.outcomes[submit.id].ids for submit in crowd] == expected


def test_output_that_is_not_finite_ends_its_request_while_the_next_step_flies(
    drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive.submit([_submit("expected", start=60)])
    drive.until_ended()

    def not_finite(logits: torch.Tensor, draws: Any) -> Picks:
        found = pick_rows(logits, draws)
        found.found[1, 0] = 0
        return found

    drive.submit([_submit("nan"), _submit("beside", start=60)])
    _until_flying(drive)
    with monkeypatch.context() as patch:
        patch.setattr("loractl.server.engine.next_tokens.pick_rows", not_finite)
        drive.once()
    drive.until_ended()
    assert "not finite" in drive.outcomes[RequestId("nan")].failed.error.message
    assert drive.outcomes[RequestId("beside")].ids == drive.outcomes[RequestId("expected")].ids
    drive.submit([_submit("after")])
    drive.until_ended()
    assert drive.outcomes[RequestId("after")].finished.num_cached_tokens == 0
