"""The playground in a real browser: two answers stream side by side, by keyboard, on a phone, with a key."""

import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, ViewportSize, expect

from chromium import browser, complaints, screenshot
from loractl.server.access import Access

pytestmark = pytest.mark.slow

FIGURES = re.compile(r"^first token \d+ ms · 60 tokens · [\d.]+ tokens/s$")
PHONE: ViewportSize = {"width": 360, "height": 740}


@pytest.fixture
async def chromium() -> AsyncIterator[Browser]:
    async with browser() as started:
        yield started


def _pictures(tmp_path: Path) -> Path:
    return Path(os.environ.get("LORACTL_SCREENSHOTS") or tmp_path)


async def test_page_allows_nothing_inline_and_nothing_foreign(live: Any) -> None:
    for path in ("/", "/playground/playground.js", "/playground/playground.css", "/playground/icon.svg"):
        answer = await live.http.get(path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    text = (await live.http.get("/")).text
    assert "http://" not in text
    assert "https://" not in text
    assert "<style" not in text
    assert " onclick" not in text


async def test_page_escapes_what_stands_in_its_address(live: Any) -> None:
    text = (await live.http.get("/", params={"a": '"><script>alert(1)</script>'})).text
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


async def test_both_answers_stream_side_by_side_with_time_to_first_token(
    live: Any, chromium: Browser, tmp_path: Path
) -> None:
    live.engine.step_s = 0.03
    page = await chromium.new_page(viewport={"width": 1200, "height": 800})
    said = complaints(page)
    await page.goto(f"{live.url}/?a=cats&b=dogs")
    await screenshot(page, _pictures(tmp_path), "empty")
    await page.get_by_label("Prompt", exact=True).fill("<b>a quick brown fox</b>")
    await page.get_by_label("Longest answer").fill("60")
    await page.get_by_role("button", name="Ask both").click()
    left, right = page.locator("#side-a .answer"), page.locator("#side-b .answer")
    # Both have begun while both go on: neither waits for the other.
    await expect(left).to_contain_text("cccccccc")
    await expect(right).to_contain_text("dddddddd")
    await expect(left).to_have_attribute("aria-busy", "true")
    await expect(right).to_have_attribute("aria-busy", "true")
    await screenshot(page, _pictures(tmp_path), "streaming")
    for name in ("a", "b"):
        figures = page.locator(f"#side-{name} .figures")
        await expect(figures).to_have_text(FIGURES, timeout=20_000)
    # What a model says is text, never markup.
    assert await page.locator(".answer b").count() == 0
    await screenshot(page, _pictures(tmp_path), "answered")
    assert said == []


async def test_keyboard_alone_asks_and_stops(live: Any, chromium: Browser) -> None:
    live.engine.step_s = 0.03
    page = await chromium.new_page()
    await page.goto(live.url)
    for _ in range(12):
        await page.keyboard.press("Tab")
        if await page.evaluate("document.activeElement.id") == "prompt":
            break
    await page.keyboard.type("a quick brown fox")
    await page.keyboard.press("Control+Enter")
    await expect(page.locator("#side-a .figures")).to_contain_text("first token")
    await page.keyboard.press("Escape")
    await expect(page.locator("#side-a .figures")).to_contain_text("stopped")
    await expect(page.locator("#side-b .figures")).to_contain_text("stopped")
    await expect(page.get_by_role("button", name="Ask both")).to_be_enabled()


async def test_every_field_has_a_name_and_nothing_is_wider_than_a_phone(
    live: Any, chromium: Browser, tmp_path: Path
) -> None:
    page = await chromium.new_page(viewport=PHONE, has_touch=True, is_mobile=True, color_scheme="dark")
    await page.goto(f"{live.url}/?a=cats&b=dogs")
    await page.get_by_label("Prompt", exact=True).fill("a quick brown fox " + "x" * 200)
    await page.get_by_label("Longest answer").fill("40")
    await page.get_by_role("button", name="Ask both").tap()
    await expect(page.locator("#side-b .figures")).to_contain_text("40 tokens", timeout=20_000)
    assert await page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    unnamed = "[...document.querySelectorAll('input,select,textarea')].filter(e => !e.labels.length).map(e => e.id)"
    assert await page.evaluate(unnamed) == []
    for button in await page.get_by_role("button").all():
        box = await button.bounding_box()
        assert box is not None
        assert box["height"] >= 44
    await screenshot(page, _pictures(tmp_path), "phone")


async def test_names_of_adapters_need_the_key_and_a_wrong_one_is_told(
    start_server: Any, chromium: Browser, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-0123456789abcdef\n")
    live = await start_server(access=Access.from_file(keys))
    assert "cats" not in (await live.http.get("/")).text
    page = await chromium.new_page()
    await page.goto(live.url)
    await page.get_by_label("API key").fill("sk-wrong-wrong-wrong")
    await page.keyboard.press("Tab")
    await expect(page.locator("#key-note")).to_contain_text("not known")
    await page.get_by_label("API key").fill("sk-0123456789abcdef")
    await page.keyboard.press("Tab")
    await expect(page.locator("#key-note")).to_contain_text("3 models")
    await screenshot(page, _pictures(tmp_path), "key")
    await page.locator("#model-a").fill("cats")
    await page.get_by_label("Prompt", exact=True).fill("a quick brown fox")
    await page.get_by_role("button", name="Ask both").click()
    await expect(page.locator("#side-a .answer")).to_contain_text("cccccccc")
    assert "sk-0123456789abcdef" not in page.url
    assert (
        await page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])") == '[{},{},""]'
    )


async def test_failure_of_one_side_leaves_the_other_alone(live: Any, chromium: Browser, tmp_path: Path) -> None:
    page = await chromium.new_page()
    await page.goto(f"{live.url}/?a=nobody&b=dogs")
    await page.get_by_label("Prompt", exact=True).fill("a quick brown fox")
    await page.get_by_role("button", name="Ask both").click()
    await expect(page.locator("#side-a .figures.failure")).to_contain_text("nobody")
    await expect(page.locator("#side-b .answer")).to_contain_text("dddddddd")
    await screenshot(page, _pictures(tmp_path), "failure")
