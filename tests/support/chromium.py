"""The headless browser of tests, from Debian's `chromium` package. Knows no page."""

import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright


def chromium_path() -> str:
    """Where the browser is; skips the test, with the way out, where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium on PATH; on Debian: apt-get install --no-install-recommends chromium")


@contextlib.asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    """One headless browser; no sandbox, since tests run as root in containers and visit loopback alone."""
    path = chromium_path()
    async with async_playwright() as playwright:
        started = await playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield started
        finally:
            await started.close()


def complaints(page: Page) -> list[str]:
    """What the page will say went wrong: script errors, refused content, files not found."""
    found: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            found.append(message.text)

    page.on("console", note)
    page.on("pageerror", lambda error: found.append(str(error)))
    return found


async def screenshot(page: Page, folder: Path, name: str) -> Path:
    """The whole page as a picture."""
    path = folder / f"{name}.png"
    await page.screenshot(path=path, full_page=True)
    return path
