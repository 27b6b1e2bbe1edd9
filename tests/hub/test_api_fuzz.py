"""Requests made from the hub's own OpenAPI document by somebody else's generator: what it says is what is answered."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from drills import LONG
from live_hub import LiveHub, live_hub
from loractl.hub.app import create_app
from loractl.hub.settings import HubSettings
from loractl.hub.wire import API_PREFIX
from pushing import push

pytestmark = pytest.mark.drill

_NUM_EXAMPLES = 60 if LONG else 4
_DOCUMENT: dict[str, Any] = create_app(HubSettings(root=Path("nowhere"))).openapi_schema.to_schema()
# A stream of events lasts as long as its reader.
_OPERATIONS = [
    (method.upper(), path)
    for path, item in _DOCUMENT["paths"].items()
    for method in item
    if path != f"{API_PREFIX}/events"
]
# What is there, so that requests get further than to "no such repo".
_REAL = {"namespace": "team", "name": "name", "number": 1}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, adapter: Path) -> Iterator[LiveHub]:
    with live_hub(tmp_path_factory.mktemp("fuzz") / "hub", webhook_private_addresses=True) as running:
        push(running, adapter)
        with running.http() as http:
            hook = {"url": "http://127.0.0.1:9/", "pattern": "team/*"}
            http.post(f"{API_PREFIX}/webhooks", json=hook).raise_for_status()
        yield running


@pytest.mark.parametrize(("method", "path"), _OPERATIONS, ids=[f"{method} {path}" for method, path in _OPERATIONS])
def test_requests_from_the_document_are_answered_as_it_says(hub: LiveHub, method: str, path: str) -> None:
    schema = schemathesis.openapi.from_dict(_DOCUMENT)
    schema.config.update(base_url=hub.url)
    operation = schema[path][method]
    wanted = [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance]

    def ask(mode: GenerationMode) -> None:
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode), is_real=st.booleans())
        @hypothesis.settings(
            max_examples=_NUM_EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        )
        def one(case: Any, is_real: bool) -> None:
            if is_real:
                case.path_parameters = case.path_parameters and {
                    name: _REAL.get(name, value) for name, value in case.path_parameters.items()
                }
            answer = case.call(headers={"authorization": f"Bearer {hub.admin}"})
            # A receiver of webhooks that is not there is a 503, as documented; any other such is a fault.
            case.validate_response(
                answer, checks=wanted if answer.status_code == 503 else [not_a_server_error, *wanted]
            )

        one()

    takes = operation.definition.raw
    ask(GenerationMode.POSITIVE)
    if takes.get("parameters") or takes.get("requestBody"):
        # Of a text in a path nothing is wrong.
        with contextlib.suppress(Unsatisfiable):
            ask(GenerationMode.NEGATIVE)
    with hub.http() as http:
        assert http.get("/team/name/resolve/v1/adapter_config.json").status_code == 200
