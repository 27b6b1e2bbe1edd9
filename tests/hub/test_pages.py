"""The hub's pages in a real browser: searched, read, compared, on a phone; what strangers push stays text."""

import contextlib
import json
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.async_api import Browser, BrowserContext, Page, ViewportSize, expect

from chromium import browser, complaints, screenshot
from live_hub import LiveHub, live_hub
from loractl.adapters.reference import AdapterRef
from loractl.hub.client import HubClient
from pushing import push

pytestmark = pytest.mark.slow

DESKTOP: ViewportSize = {"width": 1200, "height": 800}
PHONE: ViewportSize = {"width": 360, "height": 740}

_CARD = """---
base_model: tiny-base
license: mit
---
# Reviews

Tells **good** reviews from bad ones. See [the paper](https://example.org/paper).

| data | rows |
|:-----|-----:|
| films | 1,710 |

```python
print("a line of code that is rather long, so that it must scroll inside of its own box on a phone")
```

<script>document.title = "owned"</script> <img src=x onerror="document.title='owned'">
![beacon](https://example.org/beacon.png)
[bad](javascript:alert(1)) [worse](data:text/html;base64,PHNjcmlwdD4=) [local](/logout)
"""


@pytest.fixture
async def chromium() -> AsyncIterator[Browser]:
    async with browser() as started:
        yield started


def _pictures(tmp_path: Path) -> Path:
    return Path(os.environ.get("LORACTL_SCREENSHOTS") or tmp_path)


def _manifest(step: int, **more: Any) -> dict[str, Any]:
    curve = [[at, 2.0 / (1 + at / 20) + 0.15 * ((at * 7919) % 13) / 13] for at in range(1, 215)]
    return {
        "schema_version": 1,
        "base": {"id": "tiny-base", "fingerprint": "sha256:" + "5" * 64, "quantization": "int8"},
        "task": "sentiment",
        "rank": 4,
        "targets": ["q_proj", "v_proj"],
        "num_trainable_parameters": 460_800,
        "data": {"digest": "sha256:" + "4c" * 32, "num_rows": 1710, "num_eval_rows": 90, "files": ["reviews.csv"]},
        "recipe": {"optimizer.lr": 2e-4 * step, "train.epochs": 1, "lora.rank": 4},
        "metrics": {"eval_loss": 0.143 / step, "train_loss": 0.24, "eval_accuracy": 0.82 + step / 100},
        "loss_curve": curve,
        "loractl_version": "0.1.0",
    } | more


def _folder(adapter: Path, to: Path, **more: Any) -> Path:
    """An adapter as `loractl train` leaves it: with manifest and card."""
    shutil.copytree(adapter, to)
    (to / "loractl.json").write_text(json.dumps(_manifest(**more)))
    (to / "README.md").write_text(_CARD)
    return to


@pytest.fixture(scope="module")
def shelf(adapter: Path, other_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveHub]:
    """A hub with one adapter of two versions and channels, a plain one and a private one."""
    folder = tmp_path_factory.mktemp("shelf")
    with live_hub(folder / "hub") as hub:
        _fill(hub, adapter, other_adapter, folder)
        yield hub


def _fill(hub: LiveHub, adapter: Path, other_adapter: Path, folder: Path) -> None:
    with HubClient(hub.url, hub.admin) as client:
        reviews = AdapterRef("demo", "reviews")
        client.push(_folder(adapter, folder / "one", step=1), reviews, message="First try")
        client.push(_folder(other_adapter, folder / "two", step=2), reviews, message="More rows, twice the rate")
        client.promote(AdapterRef("demo", "reviews", "v1"), "prod", reason="canary was fine")
        client.promote(AdapterRef("demo", "reviews", "v2"), "prod", reason="better on held-out films")
        client.rollback(reviews, "prod", reason="complaints about irony")
        client.promote(AdapterRef("demo", "reviews", "v2"), "prod", share=0.1, reason="try it again")
        client.push(other_adapter, AdapterRef("lab", "plain"))
        client.push(adapter, AdapterRef("secret", "plans"), private=True)


async def _signed_in(hub: LiveHub, chromium: Browser, token: str | None = None, **options: Any) -> Page:
    """A page of somebody who went through the form."""
    context: BrowserContext = await chromium.new_context(viewport=options.pop("viewport", DESKTOP), **options)
    page = await context.new_page()
    await page.goto(f"{hub.url}/login")
    await page.get_by_label("Token").fill(token or hub.admin)
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", name="Adapters")).to_be_visible()
    return page


async def test_person_signs_in_searches_reads_and_compares(shelf: LiveHub, chromium: Browser, tmp_path: Path) -> None:
    page = await chromium.new_page(viewport=DESKTOP, java_script_enabled=False)
    said = complaints(page)
    await page.goto(f"{shelf.url}/demo/reviews")
    await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    await screenshot(page, _pictures(tmp_path), "hub-login")
    said.clear()  # The browser notes the 401 that showed the form.
    await page.get_by_label("Token").fill(shelf.admin)
    await page.get_by_role("button", name="Sign in").click()
    # The sign-in leads to where the person wanted to go.
    await expect(page.get_by_role("heading", name="demo/reviews v2")).to_be_visible()
    await screenshot(page, _pictures(tmp_path), "hub-adapter")

    await page.get_by_role("link", name="Adapters").click()
    for name in ("demo/reviews", "lab/plain", "secret/plans"):
        await expect(page.get_by_role("link", name=name)).to_be_visible()
    await screenshot(page, _pictures(tmp_path), "hub-list")
    await page.get_by_label("Search").fill("review")
    await page.get_by_label("Rank").fill("4")
    await page.get_by_role("button", name="Search").click()
    await expect(page.locator(".adapters li")).to_have_count(1)
    await screenshot(page, _pictures(tmp_path), "hub-list-filtered")
    await page.get_by_role("link", name="rank: 4").click()
    assert "rank=" not in page.url
    await page.get_by_role("link", name="demo/reviews").click()

    await page.get_by_role("link", name="compare with v1").click()
    await expect(page.get_by_role("row", name="optimizer.lr 0.0002 0.0004")).to_be_visible()
    await expect(page.get_by_role("row", name="eval_loss")).to_be_visible()
    assert await page.locator(".layers tbody tr").count() == 4
    await screenshot(page, _pictures(tmp_path), "hub-diff")
    await page.get_by_role("button", name="Sign out").click()
    await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    assert [text for text in said if "401" not in text] == []


async def test_adapter_page_tells_everything_that_the_hub_knows(shelf: LiveHub, chromium: Browser) -> None:
    page = await _signed_in(shelf, chromium)
    await page.goto(f"{shelf.url}/demo/reviews?revision=prod")
    main = page.get_by_role("main")
    for text in (
        "460,800", "1,710, 90 held out", "reviews.csv", "First try", "More rows, twice the rate",
        "better on held-out films", "complaints about irony", "adapter_model.safetensors", "trained in",
        "canary: 10 % on v2",
    ):  # fmt: skip
        await expect(main.get_by_text(text).first).to_be_visible()
    await expect(page.get_by_role("img", name="Training loss over 214 steps")).to_be_visible()
    with HubClient(shelf.url, shelf.admin) as client:
        detail = client.show(AdapterRef("demo", "reviews", "prod"))
    assert detail.resolved.version == "v1"
    await expect(main.get_by_text(str(detail.resolved.digest))).to_be_visible()
    assert detail.validation is not None
    for finding in detail.validation.findings:
        await expect(main.get_by_text(finding.message).first).to_be_visible()


async def test_three_lines_load_the_adapter_that_the_page_shows(shelf: LiveHub, chromium: Browser) -> None:
    page = await _signed_in(shelf, chromium)
    await page.goto(f"{shelf.url}/demo/reviews?revision=v1")
    lines = (await page.locator("details").filter(has_text="With PEFT").locator("code").inner_text()).splitlines()
    assert len(lines) == 3
    assert f"HF_ENDPOINT={shelf.url}" in lines[0]
    assert lines[2] == 'model = PeftModel.from_pretrained(base, "demo/reviews", revision="v1")'


async def test_what_strangers_push_is_text_and_calls_nobody(shelf: LiveHub, chromium: Browser) -> None:
    page = await _signed_in(shelf, chromium)
    said = complaints(page)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await page.goto(f"{shelf.url}/demo/reviews")
    assert "owned" not in await page.title()
    card = page.locator(".card")
    assert await card.locator("script, img, iframe, [style], [onerror]").count() == 0
    await expect(card).to_contain_text("<script>")
    links = await card.locator("a").evaluate_all("found => found.map(one => [one.getAttribute('href'), one.rel])")
    assert links == [["https://example.org/paper", "nofollow noopener noreferrer ugc"]]
    assert all(url.startswith(shelf.url) for url in asked)
    # Not even a policy violation: nothing that a policy would have to stop is in the page.
    assert said == []


async def test_hostile_manifest_and_names_are_shown_and_hurt_nobody(
    shelf: LiveHub, adapter: Path, chromium: Browser, tmp_path: Path
) -> None:
    evil = '"><script>document.title="owned"</script>'
    folder = _folder(adapter, tmp_path / "evil", step=1, task=evil, loss_curve=[[1, 1.0], [2, 1e308], [3, -1e308]])
    manifest = json.loads((folder / "loractl.json").read_text())
    manifest["recipe"] = {evil: {"nested": [evil, None, True]}}
    manifest["base"]["id"] = "it's; $(reboot) `x`"
    (folder / "loractl.json").write_text(json.dumps(manifest))
    push(shelf, folder, "demo/evil")
    page = await _signed_in(shelf, chromium)
    said = complaints(page)
    for path in ("/", "/demo/evil", "/adapters/diff?a=demo/evil&b=demo/evil", f"/?q={evil}"):
        answer = await page.goto(shelf.url + path)
        assert answer is not None
        assert answer.status == 200
        assert "owned" not in await page.title()
        assert await page.locator("script").count() == 0
    assert said == []


async def test_phone_shows_all_without_scrolling_sideways(shelf: LiveHub, chromium: Browser, tmp_path: Path) -> None:
    page = await _signed_in(shelf, chromium, viewport=PHONE, is_mobile=True, has_touch=True, color_scheme="dark")
    for name, path in {
        "list": "/?q=review",
        "adapter": "/demo/reviews",
        "diff": "/adapters/diff?a=demo/reviews@v1&b=demo/reviews@v2",
        "absent": "/demo/absent",
    }.items():
        await page.goto(shelf.url + path)
        await screenshot(page, _pictures(tmp_path), f"hub-phone-{name}")
        assert await page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], name
        for control in await page.locator("button, input:not([type=hidden]), select").all():
            box = await control.bounding_box()
            assert box is not None
            assert box["height"] >= 44
        unnamed = (
            "[...document.querySelectorAll('input:not([type=hidden]),select')].filter(e => !e.labels.length).length"
        )
        assert await page.evaluate(unnamed) == 0


async def test_keyboard_alone_reaches_an_adapter(shelf: LiveHub, chromium: Browser) -> None:
    page = await _signed_in(shelf, chromium)
    await page.keyboard.press("Tab")
    assert await page.evaluate("document.activeElement.textContent") == "Skip to the content"
    await page.keyboard.press("Enter")
    for _ in range(12):
        await page.keyboard.press("Tab")
        if await page.evaluate("document.activeElement.closest('.adapters h2') !== null"):
            break
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", name="Use it")).to_be_visible()


@contextlib.contextmanager
def _session(hub: LiveHub, token: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=hub.url) as client:
        answer = client.post("/login", data={"token": token, "next": "/demo/reviews"})
        assert (answer.status_code, answer.headers["location"]) == (303, "/demo/reviews")
        flags = answer.headers["set-cookie"].lower()
        assert "httponly" in flags
        assert "samesite=lax" in flags
        assert token not in answer.headers["set-cookie"]
        yield client


def test_private_adapter_is_as_absent_to_others(shelf: LiveHub) -> None:
    with _session(shelf, shelf.token("read", pattern="demo/*")) as client:
        assert "secret/plans" not in client.get("/").text
        for query in ("q=plans", "sort=created", "rank=4"):
            assert "secret/" not in client.get(f"/?{query}").text
        hidden, absent = client.get("/secret/plans"), client.get("/secret/nothing")
        assert hidden.status_code == absent.status_code == 404
        assert hidden.text.replace("plans", "nothing") == absent.text
        hidden, absent = (
            client.get("/adapters/diff", params={"a": "demo/reviews", "b": f"secret/{name}"})
            for name in ("plans", "nothing")
        )
        assert hidden.status_code == absent.status_code == 404
    with _session(shelf, shelf.token("read", pattern="secret/*")) as client:
        assert client.get("/secret/plans").status_code == 200


def test_nobody_reads_without_a_session_and_a_session_is_no_token(shelf: LiveHub) -> None:
    with httpx.Client(base_url=shelf.url) as client:
        for path in ("/", "/demo/reviews", "/secret/plans", "/secret/nothing", "/adapters/diff?a=a/b&b=c/d"):
            answer = client.get(path)
            assert (answer.status_code, "Sign in" in answer.text) == (401, True)
            assert "demo/reviews@" not in answer.text
            # A header that scripts send is no session either.
            assert client.get(path, headers={"Authorization": f"Bearer {shelf.admin}"}).status_code == 401
    with _session(shelf, shelf.admin) as client:
        assert client.get("/demo/reviews").status_code == 200
        assert client.get("/api/loractl/v1/tokens").status_code == 401
        assert client.get("/api/models/demo/reviews").status_code == 401
        assert client.get("/demo/reviews/resolve/main/README.md").status_code == 401


def test_session_ends_with_its_token_and_cannot_be_forged(shelf: LiveHub) -> None:
    token = shelf.token("read")
    with _session(shelf, token) as client, shelf.http() as admin:
        assert client.get("/demo/reviews").status_code == 200
        name, value = next(iter(client.cookies.items()))
        other = admin.get("/api/loractl/v1/tokens").json()["tokens"][-1]["id"]
        with httpx.Client(base_url=shelf.url, cookies={name: other + value[12:]}) as forger:
            assert forger.get("/demo/reviews").status_code == 401
        admin.delete(f"/api/loractl/v1/tokens/{value[:12]}").raise_for_status()
        assert client.get("/demo/reviews").status_code == 401


@pytest.mark.parametrize("address", ["//evil.example", "https://evil.example", "/\\evil.example", "x", "/a\nb"])
def test_sign_in_leads_nowhere_but_here(shelf: LiveHub, address: str) -> None:
    with httpx.Client(base_url=shelf.url) as client:
        answer = client.post("/login", data={"token": shelf.admin, "next": address})
        assert (answer.status_code, answer.headers["location"]) == (303, "/")


@pytest.mark.parametrize("headers", [{"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}])
def test_form_of_another_site_signs_nobody_in(shelf: LiveHub, headers: dict[str, str]) -> None:
    with httpx.Client(base_url=shelf.url) as client:
        answer = client.post("/login", data={"token": shelf.admin}, headers=headers)
        assert answer.status_code == 403
        assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/?rank=many", 400),
        ("/?rank=", 200),
        ("/?cursor=nonsense", 400),
        ("/?q=" + "x" * 500, 400),
        ("/demo/reviews?revision=v99", 404),
        ("/demo/reviews/commit/0000000", 404),
        ("/demo/reviews/tree/main", 200),
        ("/adapters/diff?a=nonsense&b=demo/reviews", 400),
    ],
)
def test_wrong_addresses_are_told_on_a_page(shelf: LiveHub, path: str, status: int) -> None:
    with _session(shelf, shelf.admin) as client:
        answer = client.get(path)
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "script-src" not in policy


def test_list_goes_on_page_by_page(tmp_path: Path) -> None:
    with live_hub(tmp_path / "hub", anonymous_read=True) as hub:
        for number in range(53):
            hub.api().create_repo(f"demo/name{number}")
        with httpx.Client(base_url=hub.url) as client:
            first = client.get("/").text
            following = first.partition('rel="next" href="')[2].partition('"')[0].replace("&amp;", "&")
            second = client.get(following).text
    for number in range(53):
        assert (f'href="/demo/name{number}"' in first) != (f'href="/demo/name{number}"' in second)
