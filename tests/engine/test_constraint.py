"""Outputs match what they were asked to match: judged by `jsonschema` and `re`, on models that know no JSON."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from llguidance import LLParserLimits

from demo_assets import demo_base
from engine_drive import Drive, Outcome, adapter_use
from loractl.adapters.errors import BadRequest, WillNotFit
from loractl.server.engine import constraint
from loractl.server.engine.base_model import load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.messages import Constraint, RequestId, Sampling, Submit
from loractl.server.engine.settings import EngineSettings
from tiny_models import make_adapter, make_tiny_base

SETTINGS = EngineSettings(num_slots=2, max_rank=8, max_running=16, block_size=8, kv_bytes=1 << 21, max_queue=64)
HOT = Sampling(max_tokens=400, temperature=1.0)
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "role": {"enum": ["admin", "user"]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,4}$"}, "maxItems": 3},
        "parent": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/id"}]},
    },
    "required": ["name", "age", "role", "tags", "parent"],
    "additionalProperties": False,
    "$defs": {"id": {"type": "string", "format": "uuid"}},
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "string", "format": "date"},
    {"allOf": [{"type": "integer"}, {"minimum": 7, "maximum": 7000}]},
    {"oneOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]},
]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("constraint") / "base", initializer_range=0.3)


@pytest.fixture(scope="module")
def drive(base_folder: Path) -> Iterator[Drive]:
    drive = Drive(Engine(load_base(base_folder, quantization="none", dtype="float32"), SETTINGS))
    yield drive
    drive.engine.close()


def _schema(schema: object) -> Constraint:
    return Constraint(kind="json_schema", value=json.dumps(schema), field="response_format")


def _run(drive: Drive, *constraints: Constraint | None, **sampling: Any) -> list[Outcome]:
    start = len(drive.outcomes)
    submits = [
        Submit(
            id=RequestId(f"r{start + place}"),
            prompt=(5, 9, 200, 31, 7 + place),
            sampling=replace(HOT, **({"seed": place} | sampling), constraint=constraint),
        )
        for place, constraint in enumerate(constraints)
    ]
    drive.submit(submits)
    drive.until_ended(timeout_s=120)
    return [drive.outcomes[submit.id] for submit in submits]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_every_json_of_a_random_model_is_valid(drive: Drive, temperature: float) -> None:
    asked = [schema for schema in SCHEMAS for _ in range(2)]
    for schema, outcome in zip(asked, _run(drive, *map(_schema, asked), temperature=temperature), strict=True):
        assert outcome.finished.reason == "stop", outcome.text
        jsonschema.validate(json.loads(outcome.text), schema, format_checker=jsonschema.FormatChecker())


def test_each_row_is_held_to_its_own_constraint_and_free_rows_to_none(drive: Drive) -> None:
    free = _run(drive, None, seed=1, max_tokens=30)[0].ids
    constraints = [
        None,
        Constraint(kind="regex", value=r"\d{3}-[a-f]{2,5}!"),
        Constraint(kind="choice", value=json.dumps(["yes", 'n"o', "vielleicht ü\n"])),
        Constraint(kind="json_object"),
    ]
    rows = _run(drive, *constraints, seed=1, max_tokens=30)
    assert rows[0].ids == free
    assert re.fullmatch(r"\d{3}-[a-f]{2,5}!", rows[1].text)
    assert rows[2].text in {"yes", 'n"o', "vielleicht ü\n"}
    assert rows[3].text.lstrip().startswith("{")


def test_min_tokens_ignore_eos_and_stop_ids_yield_where_the_output_is_whole(drive: Drive) -> None:
    digits = Constraint(kind="regex", value="[0-9]{4}")
    row = _run(drive, digits, min_tokens=50, ignore_eos=True)[0]
    assert re.fullmatch("[0-9]{4}", row.text)
    assert row.finished.reason == "stop"
    assert _run(drive, Constraint(kind="regex", value="(ab)?"), min_tokens=2)[0].text == "ab"
    endless = _run(drive, Constraint(kind="regex", value="[0-9]*"), ignore_eos=True, max_tokens=40)[0]
    assert (endless.finished.reason, len(endless.ids)) == ("length", 40)
    ends = _run(drive, Constraint(kind="regex", value="[0-9]{2,}"), stop_token_ids=(1,), logit_bias={1: 100.0})[0]
    assert re.fullmatch("[0-9]{2,}", ends.text)
    assert ends.finished.stop_reason == 1


def test_constraint_goes_with_bias_penalties_logprobs_and_stop_strings(drive: Drive) -> None:
    tokenizer = drive.engine.base.tokenizer
    (seven,) = tokenizer.encode("7", add_special_tokens=False)
    nines = Constraint(kind="regex", value="[0-9]{1,20}x")
    row = _run(drive, nines, temperature=0.0, logit_bias={seven: 100.0}, num_logprobs=2, stop=("777",))[0]
    assert (row.text, row.finished.stop_reason) == ("", "777")
    assert all(token.logprob is not None and token.logprob > -1e9 for token in row.tokens)
    assert all(len(token.top) == 2 for token in row.tokens)
    spread = _run(drive, nines, temperature=0.0, repetition_penalty=10.0)[0]
    assert re.fullmatch("[0-9]{1,20}x", spread.text)


def test_seed_repeats_a_constrained_output_whatever_runs_beside_it(drive: Drive) -> None:
    alone = _run(drive, _schema(PERSON), seed=5, max_tokens=60)[0]
    beside = _run(drive, _schema(PERSON), _schema(SCHEMAS[1]), None, seed=5, max_tokens=60)[0]
    assert beside.ids == alone.ids


def test_output_that_is_preempted_goes_on_where_it_was(drive: Drive, base_folder: Path) -> None:
    expected = [outcome.ids for outcome in _run(drive, *[_schema(PERSON)] * 4, max_tokens=60)]
    settings = replace(SETTINGS, kv_bytes=14 * 8 * 2 * 2 * 2 * 8 * 4)  # 14 blocks
    tight = Drive(Engine(load_base(base_folder, quantization="none", dtype="float32"), settings))
    assert [outcome.ids for outcome in _run(tight, *[_schema(PERSON)] * 4, max_tokens=60)] == expected
    assert tight.engine.stats().counters.num_preemptions > 0
    tight.engine.close()


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (_schema({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}), "uniqueItems"),
        (_schema({"if": {"type": "string"}, "then": {"minLength": 3}}), "if, then"),
        (_schema({"$ref": "http://localhost/schema.json"}), "localhost"),
        (_schema({"type": "nonsense"}), "nonsense"),
        (_schema([1]), "is an object"),
        (Constraint(kind="json_schema", value="{", field="response_format"), "response_format"),
        (Constraint(kind="regex", value="a(?=b)"), "look-around"),
        (Constraint(kind="regex", value="["), "unclosed"),
    ],
)
def test_what_outputs_cannot_be_held_to_is_refused_by_name(drive: Drive, asked: Constraint, named: str) -> None:
    with pytest.raises(BadRequest, match=named) as refused:
        drive.engine.check_constraint(asked)
    assert refused.value.field == asked.field
    with pytest.raises(BadRequest):
        _run(drive, asked)
    drive.outcomes.clear()


def test_constraint_that_meets_a_limit_fails_alone(drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each token makes a new state of this automaton.
    monkeypatch.setattr(constraint, "_LIMITS", LLParserLimits(max_lexer_states=40, verbose_errors=False))
    rows = _run(drive, Constraint(kind="regex", value="[ab]{2000}x"), None, max_tokens=80)
    assert isinstance(rows[0].failed.error, WillNotFit)
    assert 0 < len(rows[0].ids) < 80
    assert rows[1].finished


@pytest.mark.slow
@pytest.mark.real_model
def test_real_model_fills_a_schema_with_and_without_adapter(tmp_path: Path) -> None:
    folder = demo_base()
    adapter = make_adapter(folder, tmp_path / "a", seed=1, std=0.02)
    drive = Drive(Engine(load_base(folder, quantization="int8"), EngineSettings(num_slots=2, kv_bytes=1 << 28)))
    prompt = drive.engine.base.tokenizer.encode("Alice is a 31 year old admin of the system. As JSON: ")
    use = adapter_use(adapter)
    drive.submit(
        Submit(
            id=RequestId(f"r{place}"),
            prompt=tuple(prompt),
            sampling=Sampling(max_tokens=150, temperature=place / 4, seed=place, constraint=_schema(PERSON)),
            adapters=(use,) if place % 2 else (),
        )
        for place in range(6)
    )
    drive.until_ended(timeout_s=120)
    for outcome in drive.outcomes.values():
        assert outcome.finished.reason == "stop"
        jsonschema.validate(json.loads(outcome.text), PERSON, format_checker=jsonschema.FormatChecker())
    drive.engine.close()
