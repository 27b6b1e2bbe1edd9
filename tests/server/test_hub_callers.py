"""A caller's hub token opens what its bearer may read in the hub and nothing else, and stops doing so in time."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from live_hub import LiveHub, live_hub
from loractl.adapters.errors import UsageError
from loractl.adapters.local_cache import AdapterCache
from loractl.adapters.reference import parse_reference
from loractl.hub.client import HubClient
from loractl.server.access import Access, Key
from loractl.server.assemble import Choices, check
from loractl.server.fetch.hub_reader import HubReader
from loractl.server.hub_callers import HubCallers
from tiny_models import make_adapter, make_tiny_base

pytestmark = pytest.mark.slow

BODY = {"prompt": "a fox", "max_tokens": 2}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveHub]:
    root = tmp_path_factory.mktemp("callers")
    adapter = make_adapter(make_tiny_base(root / "tiny"), root / "adapter")
    with live_hub(root / "hub") as running:
        with HubClient(running.url, running.admin) as client:
            for repo in ("blue/secret", "red/open"):
                client.push(adapter, parse_reference(repo), private=repo.startswith("blue/"))
        yield running


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def live(start_server: Any, hub: LiveHub, tmp_path: Path, clock: Clock) -> AsyncIterator[Any]:
    reader = HubReader(hub.url, token=hub.admin, cache=AdapterCache(tmp_path / "cache"))
    yield await start_server(hub=reader, access=Access(callers=HubCallers(hub.url, timeout_s=5.0, clock=clock)))
    reader.close()


async def _ask(live: Any, model: str, secret: str) -> Any:
    headers = {"authorization": f"Bearer {secret}"}
    return await live.http.post("/v1/completions", json=BODY | {"model": model}, headers=headers)


async def test_token_opens_what_its_bearer_may_read_and_the_rest_does_not_exist(live: Any, hub: LiveHub) -> None:
    red = await asyncio.to_thread(hub.token, "read", pattern="red/*", name="red")
    assert (await _ask(live, "red/open", red)).status_code == 200
    assert (await _ask(live, "tiny", red)).status_code == 200
    assert (await _ask(live, "blue/secret", hub.admin)).status_code == 200
    hidden, absent = await _ask(live, "blue/secret", red), await _ask(live, "blue/nothing", red)
    assert hidden.status_code == absent.status_code == 404
    assert hidden.json()["error"] == absent.json()["error"] | {"message": hidden.json()["error"]["message"]}
    assert (await _ask(live, "tiny", "lch_never-given-to-anybody")).status_code == 401
    models = await live.http.get("/v1/models", headers={"authorization": f"Bearer {red}"})
    names = {model["id"] for model in models.json()["data"]}
    assert not any(name.startswith("blue/") for name in names)
    assert any(name.startswith("red/open") for name in names)


async def test_revoked_token_is_refused_within_a_minute_even_for_what_is_resident(
    live: Any, hub: LiveHub, clock: Clock
) -> None:
    secret = await asyncio.to_thread(hub.token, "read", name="leaver")
    assert (await _ask(live, "red/open", secret)).status_code == 200
    with hub.http() as admin:
        tokens = admin.get("/api/loractl/v1/tokens").json()["tokens"]
        (token_id,) = [token["id"] for token in tokens if token["name"] == "leaver"]
        assert admin.delete(f"/api/loractl/v1/tokens/{token_id}").status_code == 200
    clock.now += 60.0
    assert (await _ask(live, "red/open", secret)).status_code == 401


async def test_hub_that_is_away_is_believed_for_a_minute(hub: LiveHub, clock: Clock) -> None:
    callers = HubCallers(hub.url, timeout_s=5.0, clock=clock)
    async with callers:
        assert await callers.name_of(hub.admin) is not None
        assert callers._http is not None
        callers._http.base_url = "http://127.0.0.1:9"
        clock.now += 59.0
        assert await callers.name_of(hub.admin) is not None
        clock.now += 2.0
        with pytest.raises(Exception, match="does not answer"):
            await callers.name_of(hub.admin)


async def test_key_of_a_file_uses_only_the_adapters_of_its_patterns(start_server: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("cats-key-0123456789 blue adapters=cats,team/*\n")
    live = await start_server(access=Access.from_file(path))
    assert (await _ask(live, "cats", "cats-key-0123456789")).status_code == 200
    assert (await _ask(live, "dogs", "cats-key-0123456789")).status_code == 404


async def test_adapter_has_limits_of_its_own_over_all_keys(start_server: Any) -> None:
    live = await start_server(adapter_limits=Key(requests_per_minute=2))
    codes = [(await live.http.post("/v1/completions", json=BODY | {"model": "cats"})).status_code for _ in range(3)]
    assert codes == [200, 200, 429]
    other = await live.http.post("/v1/completions", json=BODY | {"model": "dogs"})
    assert other.status_code == 200


def test_keys_from_hub_need_a_hub(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a hub"):
        check(Choices(base=str(tmp_path), keys_from_hub=True))
