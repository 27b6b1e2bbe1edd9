"""Train, push, serve, ask, promote: the installed command in real processes, on a tiny random base."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI, NotFoundError
from rich.console import Console

from demo_client import burst, digest_of
from demo_processes import Service, free_port, run_loractl, start_service
from loractl.adapters.digest import folder_digest
from tiny_models import make_tiny_base

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CONSOLE = Console(stderr=True)
ROWS = [
    ("a quick brown film", "positive"),
    ("a lazy dog", "negative"),
    ("great charm", "positive"),
    ("no sense", "negative"),
]


class Place:
    """A hub, a server and the environment in which commands reach them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = make_tiny_base(folder / "tiny-base")
        self.environment = {"LORACTL_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        self.services: list[Service] = []

    def loractl(self, *args: str) -> str:
        return run_loractl(*args, console=CONSOLE, environment=self.environment)

    def start(self, name: str, *args: str) -> Service:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        service = start_service(
            name, *args, "--port", str(port), url=url, folder=self.folder, environment=self.environment
        )
        self.services.append(service)
        service.wait_until_ready()
        return service

    def train(self, name: str, *, seed: int, label_first: str) -> Path:
        data = self.folder / f"{name}.jsonl"
        rows = ROWS if label_first == "positive" else [(text, "positive") for text, _ in ROWS]
        data.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
        out = self.folder / "adapters" / name
        self.loractl(
            *("train", "--base", str(self.base), "--data", str(data), "--out", str(out), "--preset", "article"),
            *("--quantize", "int8", "--set", "train.epochs=4", "--set", f"train.seed={seed}"),
        )
        return out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("whole-path"))
    try:
        root = place.folder / "hub"
        created = place.loractl(
            *("hub", "token", "create", "--root", str(root), "--name", "test", "--scope", "admin", "--json")
        )
        place.environment["LORACTL_TOKEN"] = json.loads(created)["token"]
        hub = place.start("hub", "hub", "serve", "--root", str(root))
        place.environment["LORACTL_HUB"] = hub.url
        for seed, name in enumerate(("first", "second")):
            folder = place.train(name, seed=seed, label_first=("positive", "always")[seed])
            place.loractl("push", str(folder), f"team/{name}", "--channel", "prod")
        place.start("server", "serve", str(place.base), "--hub", hub.url, "--quantize", "int8", "--slots", "2")
        yield place
    finally:
        for service in reversed(place.services):
            service.stop()


def _client(place: Place) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{place.services[1].url}/v1", api_key="unused", max_retries=0)


async def test_burst_names_the_digest_that_answered(place: Place) -> None:
    models = [place.base.name, "team/first@prod", "team/second@prod"]
    async with _client(place) as client:
        answers = await burst(client, models, ["the quick brown fox", "jumps over"])
    digests = {answer.model: answer.digest for answer in answers}
    assert digests["team/first@prod"] == folder_digest(place.folder / "adapters" / "first")
    assert digests["team/second@prod"] == folder_digest(place.folder / "adapters" / "second")
    assert digests[place.base.name] in {"", "base"}


async def test_promotion_reaches_the_running_server(place: Place) -> None:
    await asyncio.to_thread(place.train, "first-again", seed=9, label_first="always")
    again = place.folder / "adapters" / "first-again"
    await asyncio.to_thread(place.loractl, "push", str(again), "team/first", "--channel", "staging")
    async with _client(place) as client:
        before = await digest_of(client, "team/first@prod")
        assert before == folder_digest(place.folder / "adapters" / "first")
        await asyncio.to_thread(place.loractl, "promote", "team/first@v2", "prod")
        now = before
        for _ in range(100):
            if (now := await digest_of(client, "team/first@prod")) != before:
                break
            await asyncio.sleep(0.1)
        assert now == folder_digest(again)
        await asyncio.to_thread(place.loractl, "rollback", "team/first", "prod")
        for _ in range(100):
            if (now := await digest_of(client, "team/first@prod")) == before:
                break
            await asyncio.sleep(0.1)
        assert now == before


async def test_unknown_adapter_is_404_in_openai_shape(place: Place) -> None:
    async with _client(place) as client:
        with pytest.raises(NotFoundError) as caught:
            await client.completions.create(model="team/nobody", prompt="x", max_tokens=1)
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["param"] == "model"


async def test_server_keeps_serving_what_it_holds_when_the_hub_is_gone(place: Place) -> None:
    hub, server = place.services
    async with _client(place) as client:
        await digest_of(client, "team/second@prod")
        hub.stop()
        assert await digest_of(client, "team/second@prod") == folder_digest(place.folder / "adapters" / "second")
        unknown = await asyncio.to_thread(
            httpx.post, f"{server.url}/v1/completions", json={"model": "team/never-seen", "prompt": "x"}, timeout=10
        )
    assert unknown.status_code == 503
    assert unknown.json()["error"]["code"]


def test_services_end_cleanly_on_sigterm(place: Place) -> None:
    for service in place.services:
        service.stop()
    assert [service.process.returncode for service in place.services] == [0, 0]
