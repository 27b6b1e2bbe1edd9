"""The OpenAPI document is complete and true: requests made from it never meet a 500, wrong fields are named."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import hypothesis
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from loractl.adapters.errors import BadRequest
from loractl.server.api_document import OPERATIONS, Operation, document
from loractl.server.app import create_app
from loractl.server.openai_errors import decode_body

_EXAMPLES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/completions": {"model": "tiny", "prompt": "hi", "max_tokens": 2},
    "/v1/embeddings": {"model": "tiny", "input": "hi"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1]},
    "/admin/adapters/load": {"name": "cats"},
}
_STRANGE: list[Any] = [
    {},
    {"x": 1},
    [],
    [None],
    [[]],
    "x",
    "",
    "x" * 5000,
    True,
    -1,
    0,
    1.5,
    1e300,
    -(1 << 70),
    1 << 70,
]


async def test_document_is_openapi_and_names_every_route(live: Any) -> None:
    answer = await live.http.get("/openapi.json")
    assert answer.json() == document()
    app: Any = create_app(live.serving)
    served = {
        (method.lower(), route.path.replace("{model:path}", "{model}"))
        for route in app._app.routes
        for method in route.methods - {"OPTIONS"}
        if not route.path.startswith(("/playground/", "/openapi.json"))
    }
    assert {(each.method, each.path) for each in OPERATIONS} == served


# A drained server answers nothing; what is public has no body and no parameter.
@pytest.mark.parametrize("path", [op.path for op in OPERATIONS if not op.is_public and op.path != "/admin/drain"])
async def test_strangers_requests_never_meet_a_server_error(live: Any, path: str) -> None:
    # Otherwise a request for 2^20 tokens would be answered with as many as fit.
    live.engine.answer_text = "fox"
    schema = schemathesis.openapi.from_dict(document())
    schema.config.update(base_url=live.url)
    (operation,) = [schema[path][each.method.upper()] for each in OPERATIONS if each.path == path]

    def ask(mode: GenerationMode) -> None:
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        @hypothesis.settings(
            max_examples=15,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        )
        def one(case: Any) -> None:
            wanted = [not_a_server_error, checks.response_schema_conformance, checks.content_type_conformance]
            case.validate_response(case.call(), checks=[*wanted, checks.status_code_conformance])

        one()

    modes = [GenerationMode.POSITIVE] + ([GenerationMode.NEGATIVE] if operation.body else [])
    for mode in modes:
        await asyncio.to_thread(ask, mode)
    assert live.serving.is_ready


def _wrong_fields() -> Iterator[tuple[Operation, str, Any]]:
    """(operation, field, value) that the document refuses, judged by jsonschema."""
    whole = document()
    for operation in OPERATIONS:
        if operation.path not in _EXAMPLES or operation.body is None:
            continue
        shape = whole["components"]["schemas"][operation.body.__name__]
        for field, one in shape["properties"].items():
            judge = jsonschema.Draft202012Validator({**one, "components": whole["components"]})
            yield from ((operation, field, value) for value in _STRANGE if not judge.is_valid(value))


def test_wrong_type_or_range_of_any_field_is_400_with_its_name() -> None:
    asked = list(_wrong_fields())
    assert len(asked) > 300
    for operation, field, value in asked:
        assert operation.body is not None
        body = json.dumps(_EXAMPLES[operation.path] | {field: value}).encode()
        with pytest.raises(BadRequest) as caught:
            decode_body(body, operation.body)
        assert str(caught.value.field).startswith(field), (operation.path, field, value, caught.value.message)


async def test_document_and_answers_agree_where_the_request_is_good(live: Any) -> None:
    whole = document()
    for operation in OPERATIONS:
        body = _EXAMPLES.get(operation.path)
        if isinstance(operation.reply, str) or (body is None and operation.method == "post"):
            continue
        path = operation.path.replace("{model}", "cats")
        answer = await live.http.request(operation.method, path, json=body)
        assert answer.status_code == 200, answer.text
        shape = {"$ref": f"#/components/schemas/{operation.reply.__name__}", "components": whole["components"]}
        jsonschema.validate(answer.json(), shape)
