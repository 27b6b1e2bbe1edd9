"""The document of the own API: complete, open, and true of what the hub answers."""

from typing import Any

import msgspec

from live_hub import LiveHub
from loractl.hub.wire import API_PREFIX, ErrorBody

_SCHEMA = f"{API_PREFIX}/schema"


def _document(hub: LiveHub) -> dict[str, Any]:
    with hub.http("") as http:
        answer = http.get(f"{_SCHEMA}/openapi.json")
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


def test_document_holds_the_own_api_and_nothing_of_the_other(folder_hub: LiveHub) -> None:
    paths = _document(folder_hub)["paths"]
    own = {path for path in paths if path.startswith(API_PREFIX)}
    assert {
        f"{API_PREFIX}/{name}" for name in ("resolve", "diff", "events", "webhooks", "audit", "quotas", "tokens")
    } <= own
    assert set(paths) - own == {"/healthz", "/readyz", "/metrics"}


def test_every_own_route_tells_the_shape_of_its_errors_and_of_its_answer(folder_hub: LiveHub) -> None:
    document = _document(folder_hub)
    names = set(document["components"]["schemas"])
    for path, item in document["paths"].items():
        if not path.startswith(API_PREFIX):
            continue
        for operation in item.values():
            answers = operation["responses"]
            for status in ("400", "401", "403", "404", "409", "413", "429", "503"):
                reference = answers[status]["content"]["application/json"]["schema"]["$ref"]
                assert reference == "#/components/schemas/ErrorBody", (path, status)
            good = next(answer for status, answer in answers.items() if status.startswith("2"))
            schema = next(iter(good["content"].values()))["schema"]
            assert schema["$ref"].rpartition("/")[2] in names, path


def test_errors_have_the_shape_that_is_documented(folder_hub: LiveHub) -> None:
    properties = _document(folder_hub)["components"]["schemas"]["ErrorBody"]["properties"]
    with folder_hub.http() as http:
        for answer in (
            http.get(f"{API_PREFIX}/resolve"),
            http.get(f"{API_PREFIX}/adapters", params={"limit": "many"}),
            http.get(f"{API_PREFIX}/adapters/team/absent"),
            http.post(f"{API_PREFIX}/tokens", content=b"{"),
            http.get(f"{API_PREFIX}/nothing"),
            http.delete(f"{API_PREFIX}/resolve"),
        ):
            assert 400 <= answer.status_code < 500
            assert set(answer.json()) <= set(properties)
            assert msgspec.json.decode(answer.content, type=ErrorBody).code


def test_page_shows_every_route_and_loads_nothing_from_elsewhere(folder_hub: LiveHub) -> None:
    paths = _document(folder_hub)["paths"]
    with folder_hub.http("") as http:
        page = http.get(_SCHEMA)
    assert page.headers["content-type"].startswith("text/html")
    assert all(f"<code>{path}</code>" in page.text for path in paths)
    assert "<script" not in page.text
    assert "http://" not in page.text
    assert "https://" not in page.text


def test_name_with_control_characters_is_answered(folder_hub: LiveHub) -> None:
    with folder_hub.http() as http:
        answer = http.get(f"{API_PREFIX}/resolve", params={"repo": "a\x00b/c\x1fd", "revision": "main"})
    assert answer.status_code == 404
