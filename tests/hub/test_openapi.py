"""The document of the own API: complete, open, and true of what the hub answers."""

from pathlib import Path
from typing import Any

import msgspec

from chromium import browser, complaints, screenshot
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


def test_every_operation_says_what_it_does_and_for_whom(folder_hub: LiveHub) -> None:
    document = _document(folder_hub)
    schemes = set(document["components"]["securitySchemes"])
    for path, item in document["paths"].items():
        for operation in item.values():
            assert operation["summary"], path
            what, _, who = operation["description"].rpartition("\n\n")
            assert what.endswith("."), path
            assert who.startswith("For "), path
            is_open = who == "For everybody."
            assert is_open == (path in {"/healthz", "/readyz", "/metrics"})
            assert {name for one in operation.get("security", []) for name in one} == (set() if is_open else schemes)


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


async def test_page_works_in_a_browser_that_reaches_nothing_else(folder_hub: LiveHub, tmp_path: Path) -> None:
    paths = _document(folder_hub)["paths"]
    asked: list[str] = []
    async with browser() as chromium:
        page = await chromium.new_page(viewport={"width": 390, "height": 844})
        found = complaints(page)
        page.on("request", lambda request: asked.append(request.url))
        await page.goto(f"{folder_hub.url}{_SCHEMA}")
        assert await page.locator("section").count() == sum(len(item) for item in paths.values())
        await page.locator("summary", has_text="Answers").first.click()
        await page.locator("details[open] a", has_text="ErrorBody").first.click()
        assert page.url.endswith("#ErrorBody")
        assert await page.locator("details#ErrorBody").is_visible()
        # No line is wider than a phone.
        width = await page.evaluate("document.documentElement.scrollWidth")
        await screenshot(page, tmp_path, "schema")
    assert all(url.startswith(folder_hub.url) for url in asked)
    assert found == []
    assert width <= 390


def test_name_with_control_characters_is_answered(folder_hub: LiveHub) -> None:
    with folder_hub.http() as http:
        answer = http.get(f"{API_PREFIX}/resolve", params={"repo": "a\x00b/c\x1fd", "revision": "main"})
    assert answer.status_code == 404
