"""What a request may count on: one end, cancel at any time, stop strings, its adapter, a limit it is told about."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine_drive import Drive, adapter_use
from loractl.adapters.errors import BadRequest, EngineFailure, LoractlError, Overloaded, Unsupported
from loractl.server.engine.base_model import load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.messages import AdapterUse, Cancel, RequestId, Sampling, Submit
from loractl.server.engine.settings import EngineSettings
from tiny_models import make_adapter, make_tiny_base

GREEDY = Sampling(max_tokens=10, temperature=0.0, ignore_eos=True)
PROMPT = (5, 9, 200, 31, 7)
SETTINGS = EngineSettings(num_slots=2, max_rank=8, max_running=8, block_size=4, kv_bytes=1 << 20, max_queue=16)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("requests") / "base")


@pytest.fixture(scope="module")
def adapters(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterUse]:
    root = tmp_path_factory.mktemp("adapters")
    folders = [make_adapter(base_folder, root / f"a{seed}", seed=seed) for seed in range(5)]
    return [adapter_use(folder) for folder in folders]


@pytest.fixture
def drive(base_folder: Path) -> Iterator[Drive]:
    drive = _drive(base_folder, SETTINGS)
    yield drive
    drive.engine.close()


def _drive(base_folder: Path, settings: EngineSettings) -> Drive:
    return Drive(Engine(load_base(base_folder, quantization="none", dtype="float32"), settings))


def _submit(name: str, *uses: AdapterUse, prompt: tuple[int, ...] = PROMPT, **sampling: Any) -> Submit:
    return Submit(id=RequestId(name), prompt=prompt, sampling=replace(GREEDY, **sampling), adapters=uses)


def _run(drive: Drive, request: Submit) -> Any:
    drive.submit([request])
    drive.until_ended()
    return drive.outcomes[request.id]


def test_finished_tells_length_and_counts_when_max_tokens_are_reached(drive: Drive) -> None:
    outcome = _run(drive, _submit("a"))
    assert outcome.finished.reason == "length"
    assert (outcome.finished.num_prompt_tokens, outcome.finished.num_output_tokens) == (5, 10)
    assert outcome.text == drive.engine.base.tokenizer.decode(outcome.ids, skip_special_tokens=True)


def test_cancel_ends_a_request_once_when_it_waits_runs_or_has_ended(drive: Drive, adapters: list[AdapterUse]) -> None:
    drive.submit([_submit("running", max_tokens=200), _submit("loading", adapters[0], max_tokens=200)])
    drive.engine.cancel(Cancel(id=RequestId("loading")))
    while not drive.outcomes[RequestId("running")].tokens:
        drive.once()
    for _ in range(2):
        drive.engine.cancel(Cancel(id=RequestId("running")))
        drive.engine.cancel(Cancel(id=RequestId("unknown")))
        drive.once()
    drive.until_ended()
    assert [outcome.finished.reason for outcome in drive.outcomes.values()] == ["cancelled", "cancelled"]
    assert drive.engine.stats().kv_blocks_used == 0
    assert drive.engine.stats().running == 0


@pytest.mark.parametrize("include_stop", [False, True])
def test_text_ends_at_the_stop_string_when_it_spans_tokens(drive: Drive, include_stop: bool) -> None:
    whole = _run(drive, _submit("whole", max_tokens=30)).text
    stop = whole[6:10]
    end = whole.index(stop)
    outcome = _run(drive, _submit("stopped", max_tokens=30, stop=(stop,), include_stop=include_stop))
    assert outcome.finished.reason == "stop"
    assert outcome.finished.stop_reason == stop
    assert outcome.text == whole[: end + len(stop) * include_stop]


def test_request_stops_without_showing_the_token_when_a_stop_token_comes(drive: Drive) -> None:
    ids = _run(drive, _submit("whole")).ids
    outcome = _run(drive, _submit("stopped", stop_token_ids=(ids[3],)))
    assert outcome.finished.reason == "stop"
    assert outcome.finished.stop_reason == ids[3]
    assert drive.engine.base.tokenizer.decode(ids[: ids.index(ids[3])], skip_special_tokens=True) == outcome.text


def test_every_adapter_answers_as_alone_when_there_are_more_adapters_than_slots(
    drive: Drive, adapters: list[AdapterUse]
) -> None:
    alone = [_run(drive, _submit(f"alone{number}", use)).ids for number, use in enumerate(adapters)]
    assert len({tuple(ids) for ids in alone}) == len(adapters)
    drive.submit(_submit(f"crowd{n}-{i}", use) for n in range(2) for i, use in enumerate(adapters))
    drive.until_ended()
    for n in range(2):
        assert [drive.outcomes[RequestId(f"crowd{n}-{i}")].ids for i in range(len(adapters))] == alone
    stats = drive.engine.stats()
    assert len(stats.slots) <= 2
    assert stats.counters.num_adapter_evictions >= len(adapters) - 2
    assert max(record.num_distinct_adapters for record in drive.records) == 2


def test_base_requests_run_when_an_adapter_ahead_of_them_has_no_slot(drive: Drive, adapters: list[AdapterUse]) -> None:
    drive.submit([_submit("x", adapters[0], max_tokens=60), _submit("y", adapters[1], max_tokens=60)])
    drive.submit([_submit("waits", adapters[2]), _submit("base")])
    while not drive.outcomes[RequestId("base")].ends:
        drive.once()
    assert not drive.outcomes[RequestId("waits")].ends
    drive.until_ended()
    assert drive.outcomes[RequestId("waits")].finished.reason == "length"


def test_answers_stay_the_same_when_kv_runs_out_and_requests_are_preempted(base_folder: Path, drive: Drive) -> None:
    prompts = [tuple(range(start, start + 6)) for start in (10, 40, 70, 100)]
    expected = [_run(drive, _submit(f"p{i}", prompt=p, max_tokens=24)).ids for i, p in enumerate(prompts)]
    tight = _drive(base_folder, replace(SETTINGS, kv_bytes=16 * 4 * 2 * 2 * 2 * 8 * 4))  # 16 blocks
    tight.submit(_submit(f"p{i}", prompt=p, max_tokens=24) for i, p in enumerate(prompts))
    tight.until_ended()
    assert [tight.outcomes[RequestId(f"p{i}")].ids for i in range(4)] == expected
    assert tight.engine.stats().counters.num_preemptions > 0
    assert [tight.outcomes[RequestId(f"p{i}")].finished.num_output_tokens for i in range(4)] == [24] * 4
    tight.engine.close()


def test_submit_refuses_when_the_prompt_exceeds_the_model_or_the_queue_is_full(drive: Drive) -> None:
    with pytest.raises(BadRequest):
        drive.engine.submit(_submit("long", prompt=(5,) * 600))
    with pytest.raises(BadRequest):
        drive.engine.submit(_submit("empty", prompt=()))
    with pytest.raises(Overloaded):
        drive.submit(_submit(f"q{number}") for number in range(40))


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"trainable_token_indices": [1]}, "trainable_token_indices"), ({"r": 16}, "rank 16"), ({"bias": "all"}, "bias")],
)
def test_resolve_adapter_names_the_feature_when_it_is_not_served(
    drive: Drive, base_folder: Path, tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    folder = make_adapter(base_folder, tmp_path / "odd", **settings)
    with pytest.raises(Unsupported, match=named):
        drive.engine.resolve_adapter(folder)
    outcome = _run(drive, _submit("odd", adapter_use(folder)))
    assert isinstance(outcome.failed.error, Unsupported)


def test_only_the_steps_requests_fail_when_a_forward_pass_raises(drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _run(drive, _submit("before")).ids
    model: Any = drive.engine.base.model.model

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", broken)
        outcome = _run(drive, _submit("unlucky"))
    assert isinstance(outcome.failed.error, EngineFailure)
    assert _run(drive, _submit("after")).ids == expected


def test_an_engine_built_again_on_the_same_base_answers_alike(drive: Drive, adapters: list[AdapterUse]) -> None:
    expected = _run(drive, _submit("first", adapters[0])).ids
    drive.engine.close()
    again = Drive(Engine(drive.engine.base, SETTINGS))
    assert _run(again, _submit("second", adapters[0])).ids == expected
    again.engine.close()


def test_sampling_repeats_itself_when_the_seed_is_the_same(drive: Drive) -> None:
    hot: dict[str, Any] = {"temperature": 1.5, "top_p": 0.95, "max_tokens": 16}
    drive.submit(_submit(f"s{n}", seed=seed, **hot) for n, seed in enumerate((7, 7, 8)))
    drive.until_ended()
    first, same, other = (drive.outcomes[RequestId(f"s{n}")].ids for n in range(3))
    assert first == same
    assert first != other


def test_sampling_equals_greedy_when_one_token_is_left(drive: Drive) -> None:
    expected = _run(drive, _submit("greedy")).ids
    assert _run(drive, _submit("k", temperature=1.0, top_k=1)).ids == expected
    assert _run(drive, _submit("p", temperature=1.0, top_p=1e-6)).ids == expected
    assert _run(drive, _submit("min", temperature=1.0, min_p=1.0)).ids == expected


def test_logit_bias_bans_and_forces_tokens_when_it_is_large(drive: Drive) -> None:
    greedy = _run(drive, _submit("greedy")).ids
    assert _run(drive, _submit("forced", logit_bias={77: 1000.0})).ids == [77] * 10
    assert greedy[0] not in _run(drive, _submit("banned", logit_bias={greedy[0]: -1000.0})).ids


def test_end_comes_after_min_tokens_and_at_once_without(drive: Drive) -> None:
    eos = min(drive.engine.base.eos_token_ids)
    eager: dict[str, Any] = {"logit_bias": {eos: 1000.0}, "ignore_eos": False}
    assert _run(drive, _submit("eager", **eager)).ids == []
    held = _run(drive, _submit("held", min_tokens=4, **eager))
    assert (len(held.ids), held.finished.reason) == (4, "stop")
    ids = _run(drive, _submit("whole", logit_bias={77: 1000.0}, stop_token_ids=(77,), min_tokens=3)).ids
    assert len(ids) == 3
    assert 77 not in ids


def test_adapter_that_cannot_be_read_fails_its_request_when_files_are_missing(drive: Drive, tmp_path: Path) -> None:
    drive.submit([_submit("base"), _submit("gone", AdapterUse(digest=_digest_of_nothing(), folder=tmp_path / "gone"))])
    drive.until_ended()
    assert isinstance(drive.outcomes[RequestId("gone")].failed.error, LoractlError)
    assert drive.outcomes[RequestId("base")].finished.reason == "length"


def _digest_of_nothing() -> Any:
    return "sha256:" + "0" * 64
