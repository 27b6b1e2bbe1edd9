"""A request that breaks a step ends alone; the others get the very tokens that they would have had."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_drive import Drive, adapter_use
from loractl.adapters.errors import EngineFailure
from loractl.server.engine.base_model import load_base
from loractl.server.engine.containment import run_contained
from loractl.server.engine.engine import Engine
from loractl.server.engine.messages import AdapterUse, RequestId, Sampling, Submit
from loractl.server.engine.runner import Part
from loractl.server.engine.settings import EngineSettings
from tiny_models import make_adapter, make_tiny_base

SETTINGS = EngineSettings(num_slots=4, max_rank=8, max_running=16, block_size=4, kv_bytes=1 << 20, max_queue=64)
POISON = 255
"""A token that a step cannot have in it, once a test says so."""


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("containment") / "base")


@pytest.fixture(scope="module")
def adapters(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterUse]:
    root = tmp_path_factory.mktemp("adapters")
    folders = [make_adapter(base_folder, root / f"a{seed}", seed=seed) for seed in range(3)]
    return [adapter_use(folder) for folder in folders]


@pytest.fixture
def drive(base_folder: Path) -> Iterator[Drive]:
    drive = Drive(Engine(load_base(base_folder, quantization="none", dtype="float32"), SETTINGS))
    yield drive
    drive.engine.check_books()
    drive.engine.close()


def _submit(name: str, prompt: Sequence[int], *uses: AdapterUse) -> Submit:
    sampling = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True, logit_bias={POISON: -100.0})
    return Submit(id=RequestId(name), prompt=tuple(prompt), sampling=sampling, adapters=uses)


def _poisoned(drive: Drive, fault: Callable[[], object], counts: list[int]) -> Callable[..., Any]:
    """The model's own forward pass, with a fault wherever a row holds the poison."""
    model: Any = drive.engine.base.model
    forward = model.forward

    def run(*args: object, **kwargs: Any) -> Any:
        ids = kwargs["input_ids"]
        counts.append(ids.shape[1])
        if bool((ids == POISON).any()):
            fault()
        return forward(*args, **kwargs)

    return run


def _raise(error: Exception) -> Callable[[], object]:
    def fault() -> None:
        raise error

    return fault


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a kernel"),
        torch.OutOfMemoryError("too much"),
        MemoryError(),
        IndexError("model code"),
        KeyError(3),
    ],
    ids=lambda error: type(error).__name__,
)
def test_one_poisoned_request_of_sixteen_ends_alone(
    drive: Drive, adapters: list[AdapterUse], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    places: list[tuple[AdapterUse, ...]] = [(), *((use,) for use in adapters)]
    good = [_submit(f"g{n}", [5 + n, 40, 41, 9], *places[n % 4]) for n in range(15)]
    drive.submit(good)
    drive.until_ended()
    expected = {name: outcome.ids for name, outcome in drive.outcomes.items()}
    counts: list[int] = []
    monkeypatch.setattr(drive.engine.base.model, "forward", _poisoned(drive, _raise(error), counts))
    again = [replace(submit, id=RequestId(f"again-{submit.id}")) for submit in good]
    bad = _submit("bad", [7, 8, POISON, 3], adapters[0])
    drive.submit([*again[:9], bad, *again[9:]])
    drive.until_ended()
    assert isinstance(drive.outcomes[bad.id].failed.error, EngineFailure)
    for submit, repeated in zip(good, again, strict=True):
        assert drive.outcomes[repeated.id].ids == expected[submit.id]
    assert drive.engine.stats().counters.num_contained_failures == 1


@pytest.mark.parametrize("num_parts", [1, 2, 3, 16, 64])
def test_culprit_is_found_by_halving(num_parts: int) -> None:
    parts = [Part(tokens=[n], length=1, blocks=[], slots=(), num_logits=1) for n in range(num_parts)]
    for culprit in range(num_parts):
        num_runs = 0

        def run(chosen: Sequence[Part], culprit: int = culprit) -> torch.Tensor:
            nonlocal num_runs
            num_runs += 1
            if any(part.tokens[0] == culprit for part in chosen):
                raise RuntimeError("poison")
            return torch.tensor([[float(part.tokens[0])] for part in chosen])

        result = run_contained(run, parts)
        assert list(result.broken) == [culprit]
        got = {place: float(row[0]) for places, rows in result.runs for place, row in zip(places, rows, strict=True)}
        assert got == {n: float(n) for n in range(num_parts) if n != culprit}
        assert num_runs - 1 <= math.ceil(math.log2(num_parts)) + 1


def test_fault_that_does_not_come_again_has_no_culprit() -> None:
    parts = [Part(tokens=[n], length=1, blocks=[], slots=(), num_logits=1) for n in range(8)]
    faults = iter([RuntimeError("once")])

    def run(chosen: Sequence[Part]) -> torch.Tensor:
        if (error := next(faults, None)) is not None:
            raise error
        return torch.zeros(len(chosen), 1)

    result = run_contained(run, parts)
    assert not result.broken
    assert sorted(place for places, _ in result.runs for place in places) == list(range(8))


def test_output_that_is_not_finite_ends_its_request_and_leaves_nothing_to_share(
    drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [*range(10, 30), 3]
    expected = _submit("expected", [5, 6, 7])
    drive.submit([expected])
    drive.until_ended()
    scan: Any = __import__("loractl.server.engine.next_tokens", fromlist=["scan_rows"])
    whole = scan.scan_rows

    def not_finite(logits: torch.Tensor) -> Any:
        best, finite = whole(logits)
        return best, [place != 0 and ok for place, ok in enumerate(finite)]

    with monkeypatch.context() as patch:
        patch.setattr(scan, "scan_rows", not_finite)
        drive.submit([_submit("nan", prompt), _submit("beside", [5, 6, 7])])
        while not drive.outcomes[RequestId("nan")].ends:
            drive.once()
    drive.submit([_submit("after", prompt)])
    drive.until_ended()
    assert "not finite" in drive.outcomes[RequestId("nan")].failed.error.message
    assert drive.engine.stats().counters.num_nonfinite == 1
    assert drive.outcomes[RequestId("beside")].ids == drive.outcomes[RequestId("expected")].ids
    assert drive.outcomes[RequestId("after")].finished.num_cached_tokens == 0


def test_request_that_broke_two_steps_is_refused_at_the_door(drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drive.engine.base.model, "forward", _poisoned(drive, _raise(RuntimeError("x")), []))
    for n in range(2):
        drive.submit([_submit(f"bad{n}", [9, POISON])])
        drive.until_ended()
    with pytest.raises(EngineFailure, match="failed 2 times"):
        drive.engine.submit(_submit("bad2", [9, POISON]))
    assert drive.engine.stats().num_quarantined_requests == 1
    drive.submit([_submit("good", [9, 10])])
    drive.until_ended()
    assert drive.outcomes[RequestId("good")].finished


def test_engine_whose_every_step_breaks_hands_itself_to_its_supervisor(
    drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drive.engine.base.model, "forward", lambda **_: (_ for _ in ()).throw(RuntimeError("dead")))
    for n in range(2):
        drive.submit([_submit(f"r{n}", [9, n])])
        drive.until_ended()
    drive.submit([_submit("r2", [9, 2])])
    with pytest.raises(RuntimeError, match="dead"):
        drive.until_ended()
    drive.outcomes.clear()
    monkeypatch.undo()
    rebuilt = Drive(Engine(drive.engine.base, SETTINGS))  # as the supervisor does: the weights stay
    rebuilt.submit([_submit("r3", [9, 3])])
    rebuilt.until_ended()
    assert rebuilt.outcomes[RequestId("r3")].finished
    rebuilt.engine.close()
