"""Faults on purpose between a server and a real hub: away, slow, damaging; files that rot; repos and rights that go.

The engine is a fake that echoes prompts; hub, proxy, client and disk cache are real.
"""

import asyncio
import contextlib
import json
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drill_server import drill_server
from drills import BODY, LONG, encoded, print_figures, share, stream, until
from faulty_proxy import FaultyProxy, faulty_proxy
from hostile_files import CONFIG, WEIGHTS, sound_config, weights
from hub_process import HubProcess, hub_process
from live_hub import LiveHub, live_hub
from loractl.adapters.digest import folder_digest
from loractl.adapters.local_cache import AdapterCache
from loractl.adapters.reference import Digest, parse_reference
from loractl.hub.client import HubClient
from loractl.server.access import Access
from loractl.server.fetch.hub_reader import HubReader
from loractl.server.hub_callers import HubCallers

pytestmark = pytest.mark.drill


def _folder(root: Path, number: int) -> Path:
    """A sound adapter unlike every other; the fake engine never reads it."""
    folder = root / f"adapter-{number}"
    folder.mkdir(parents=True)
    (folder / CONFIG).write_bytes(sound_config())
    (folder / WEIGHTS).write_bytes(weights(a=np.random.default_rng(number).normal(size=(4, 64))))
    return folder


def _push(hub: LiveHub | HubProcess, root: Path, *names: str) -> None:
    with HubClient(hub.url, hub.admin) as client:
        for number, name in enumerate(names):
            client.push(_folder(root, number), parse_reference(name))


@contextlib.asynccontextmanager
async def _beside(context: Any) -> AsyncIterator[Any]:
    """Open and close a blocking context in a thread, so that this loop goes on."""
    value = await asyncio.to_thread(context.__enter__)
    try:
        yield value
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)


async def _ask(live: Any, model: str, **changes: Any) -> Any:
    return await live.http.post("/v1/completions", json=BODY | {"model": model, "max_tokens": 2} | changes)


def _cache_is_sound(cache: Path) -> bool:
    folders = list((cache / "sha256").iterdir())
    return all(folder_digest(folder) == f"sha256:{folder.name}" for folder in folders)


async def test_hub_that_is_down_costs_only_what_is_not_here(start_server: Any, tmp_path: Path) -> None:
    async with _beside(hub_process(tmp_path / "hub")) as hub:
        await asyncio.to_thread(_push, hub, tmp_path, "team/here", "team/away")
        reader = HubReader(hub.url, token=hub.admin, cache=AdapterCache(tmp_path / "cache"))
        live = await start_server(hub=reader)
        assert (await _ask(live, "team/here")).status_code == 200
        await asyncio.to_thread(hub.stop)
        num_asked = 200 if LONG else 40
        codes: Counter[int] = Counter()
        refusals: list[float] = []
        for _ in range(num_asked):
            codes[(await _ask(live, "team/here")).status_code] += 1
            codes[(await _ask(live, "tiny")).status_code] += 1
            started = time.monotonic()
            refused = await _ask(live, "team/away")
            refusals.append(time.monotonic() - started)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "unreachable"
            assert int(refused.headers["retry-after"]) >= 1
            await asyncio.sleep(0.01)
        assert codes == {200: 2 * num_asked}
        assert "loractl_server_hub_up 0.0" in (await live.http.get("/metrics")).text
        await asyncio.to_thread(hub.start)
        started = time.monotonic()
        async with asyncio.timeout(30):
            while (await _ask(live, "team/away")).status_code != 200:
                await asyncio.sleep(0.05)
        back_s = time.monotonic() - started
        assert "loractl_server_hub_up 1.0" in (await live.http.get("/metrics")).text
        print_figures(
            "5",
            answered=f"{codes[200]}/{2 * num_asked}",
            refused_in_ms_p50=round(share(refusals, 0.5) * 1e3, 1),
            refused_in_ms_at_most=round(max(refusals) * 1e3, 1),
            recovered_after_s=round(back_s, 2),
        )
        reader.close()


def _break(proxy: FaultyProxy, fault: str) -> None:
    if fault == "truncated":
        proxy.cut = (WEIGHTS, 500)
    elif fault == "flipped":
        proxy.flip = WEIGHTS
    elif fault == "500":
        proxy.refuse = (WEIGHTS, 500, {})
    elif fault == "503":
        proxy.refuse = ("/api/", 503, {"Retry-After": "1"})
    else:
        proxy.delay = ("/resolve", 1.5)


async def test_hub_that_is_slow_or_lies_installs_nothing_and_slows_nobody(start_server: Any, tmp_path: Path) -> None:
    faults = ["truncated", "flipped", "500", "503", "slow"] * (4 if LONG else 1)
    names = [f"team/a{number}" for number in range(len(faults))]
    async with _beside(live_hub(tmp_path / "hub")) as hub:
        await asyncio.to_thread(_push, hub, tmp_path, *names)
        async with _beside(faulty_proxy(hub.url)) as proxy:
            reader = HubReader(proxy.url, token=hub.admin, cache=AdapterCache(tmp_path / "cache"))
            live = await start_server(hub=reader, prepare=lambda engine: setattr(engine, "step_s", 0.01))
            quiet, loud = await _gaps(live), asyncio.create_task(_gaps(live))
            outcomes: Counter[str] = Counter()
            for name, fault in zip(names, faults, strict=True):
                _break(proxy, fault)
                answer = await _ask(live, name)
                # The stock client may try again by itself; then there is nothing to see.
                assert answer.status_code in {200, 503}, (fault, answer.text)
                outcomes[f"{fault} {answer.status_code}"] += 1
                assert await asyncio.to_thread(_cache_is_sound, tmp_path / "cache")
                proxy.delay = None
                async with asyncio.timeout(30):
                    while (answer := await _ask(live, name)).status_code != 200:
                        assert answer.status_code == 503, answer.text
                        await asyncio.sleep(0.1)
            gaps = quiet, await loud
            print_figures(
                "6",
                outcomes=dict(outcomes),
                installed_damaged=0,
                itl_p99_ms_without=round(share(gaps[0], 0.99) * 1e3, 1),
                itl_p99_ms_meanwhile=round(share(gaps[1], 0.99) * 1e3, 1),
            )
            reader.close()


async def _gaps(live: Any) -> list[float]:
    """Seconds between the events of a stream of the base."""
    gaps: list[float] = []
    async with live.http.stream("POST", "/v1/completions", content=encoded(stream=True)) as answer:
        last = None
        async for _ in answer.aiter_raw():
            now = time.monotonic()
            if last is not None:
                gaps.append(now - last)
            last = now
    return gaps


def _damage(file: Path, how: str) -> None:
    data = file.read_bytes()
    file.chmod(0o644)
    if how == "one bit flipped":
        file.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    elif how == "truncated":
        file.write_bytes(data[:-1])
    else:
        elsewhere = file.parents[3] / "elsewhere"
        elsewhere.write_bytes(b"x" * len(data))
        file.unlink()
        file.symlink_to(elsewhere)


@pytest.mark.parametrize("how", ["one bit flipped", "truncated", "a symlink"])
async def test_file_that_rots_in_the_cache_is_fetched_once_more(start_server: Any, tmp_path: Path, how: str) -> None:
    async with _beside(live_hub(tmp_path / "hub")) as hub:
        await asyncio.to_thread(_push, hub, tmp_path, "team/a")
        async with _beside(faulty_proxy(hub.url)) as proxy:
            reader = HubReader(proxy.url, token=hub.admin, cache=AdapterCache(tmp_path / "cache"))
            live = await start_server(hub=reader)
            digest = Digest((await _ask(live, "team/a")).headers["x-loractl-adapter"])
            folder = tmp_path / "cache" / "sha256" / digest.removeprefix("sha256:")
            _damage(folder / WEIGHTS, how)
            before = sum(WEIGHTS in path for path in proxy.paths("GET"))
            answer = await _ask(live, "team/a")
            assert answer.status_code == 200
            assert folder_digest(live.engine.submitted[-1].adapters[0].folder) == digest
            num_fetched = sum(WEIGHTS in path for path in proxy.paths("GET")) - before
            assert num_fetched == 1
            print_figures(f"7, {how}", downloads=num_fetched, tokens_from_damaged_files=0)
            reader.close()


async def test_server_that_was_killed_in_a_download_starts_clean(tmp_path: Path) -> None:
    async with _beside(live_hub(tmp_path / "hub")) as hub:
        await asyncio.to_thread(_push, hub, tmp_path, "team/a")
        async with _beside(faulty_proxy(hub.url)) as proxy:
            options = {"hub": proxy.url, "token": hub.admin, "cache": str(tmp_path / "cache")}
            body = encoded(model="team/a", max_tokens=2, stream=True)
            proxy.delay = (WEIGHTS, 3.0)
            with drill_server(tmp_path / "log", **options) as server:
                asked = asyncio.create_task(stream(server.port, body))
                await until(lambda: any((tmp_path / "cache" / "locks").iterdir()))
                await asyncio.sleep(0.2)
                server.signal(signal.SIGKILL)
                assert (await asked).status == 0
            proxy.delay = None
            with drill_server(tmp_path / "log", **options) as server:
                started = time.monotonic()
                answer = await stream(server.port, body)
                assert (answer.status, answer.is_whole) == (200, True)
                print_figures("12, SIGKILL", first_token_s_after_restart=round(time.monotonic() - started, 2))


async def test_deleted_repo_ends_for_new_requests_and_not_for_those_in_flight(
    start_server: Any, tmp_path: Path
) -> None:
    async with _beside(live_hub(tmp_path / "hub")) as hub:
        await asyncio.to_thread(_push, hub, tmp_path, "team/a")
        reader = HubReader(hub.url, token=hub.admin, cache=AdapterCache(tmp_path / "cache"))
        live = await start_server(hub=reader, prepare=lambda engine: setattr(engine, "step_s", 0.01))
        running = asyncio.create_task(_ask(live, "team/a", max_tokens=400))
        await until(lambda: live.engine.submitted)
        await asyncio.to_thread(hub.api().delete_repo, "team/a")
        started = time.monotonic()
        async with asyncio.timeout(30):
            while (answer := await _ask(live, "team/a")).status_code == 200:
                await asyncio.sleep(0.02)
        seconds = time.monotonic() - started
        assert answer.status_code == 404
        assert (await running).json()["usage"]["completion_tokens"] == 400
        print_figures("21, deleted", not_found_after_s=round(seconds, 2), in_flight="finished")
        reader.close()


async def test_revoked_token_is_refused_for_what_is_resident(start_server: Any, tmp_path: Path) -> None:
    shift_s = 0.0
    async with _beside(live_hub(tmp_path / "hub")) as hub:
        await asyncio.to_thread(_push, hub, tmp_path, "team/a")
        secret = await asyncio.to_thread(hub.token, "read", name="leaver")
        reader = HubReader(hub.url, token=hub.admin, cache=AdapterCache(tmp_path / "cache"))
        callers = HubCallers(hub.url, timeout_s=5.0, clock=lambda: time.monotonic() + shift_s)
        live = await start_server(hub=reader, access=Access(callers=callers))
        headers = {"authorization": f"Bearer {secret}"}
        body = json.loads(encoded(model="team/a", max_tokens=1))

        async def status() -> int:
            return int((await live.http.post("/v1/completions", json=body, headers=headers)).status_code)

        assert await status() == 200
        with hub.http() as admin:
            tokens = admin.get("/api/loractl/v1/tokens").json()["tokens"]
            (token_id,) = [token["id"] for token in tokens if token["name"] == "leaver"]
            assert admin.delete(f"/api/loractl/v1/tokens/{token_id}").status_code == 200
        started = time.monotonic()
        # In the short form the minute passes on the server's clock alone.
        shift_s = 0.0 if LONG else 60.0
        async with asyncio.timeout(90):
            while await status() == 200:
                await asyncio.sleep(0.25)
        seconds = time.monotonic() - started + shift_s
        assert await status() == 401
        assert (await live.http.get("/v1/models", headers=headers)).status_code == 401
        print_figures("22", refused_after_s=round(seconds, 1))
        reader.close()
