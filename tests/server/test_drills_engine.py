"""Faults on purpose in and before the engine: crashes, hangs, and adapters that cannot be served."""

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from drills import BODY, LONG, encoded, print_figures, stream, until
from hostile_files import A, B, entry, safetensors_bytes
from live_server import real_server
from loractl.server.bridge import BridgeLimits
from tiny_models import make_adapter, make_tiny_base

pytestmark = pytest.mark.drill

_FEW = {"max_tokens": 8, "temperature": 0}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


async def _streams(live: Any, number: int) -> "list[asyncio.Task[Any]]":
    port = int(live.url.rpartition(":")[2])
    tasks = [asyncio.create_task(stream(port, encoded(stream=True))) for _ in range(number)]
    await until(lambda: len(live.engines[-1]._rows) == number)
    await asyncio.sleep(0.1)
    return tasks


async def test_crashed_step_tells_each_request_once_and_the_engine_is_back(start_server: Any) -> None:
    live = await start_server(prepare=lambda engine: setattr(engine, "step_s", 0.02), limits=BridgeLimits())
    seconds: list[float] = []
    for _ in range(3):
        streams = await _streams(live, 20)
        live.engines[-1].raise_in_step = RuntimeError("boom")
        num_engines, started = len(live.engines), time.monotonic()
        ended = await asyncio.gather(*streams)
        assert all(one.tail.count(b'"engine_failure"') == 1 and not one.is_whole for one in ended)
        await until(lambda: len(live.engines) > num_engines and live.serving.is_ready)  # noqa: B023
        seconds.append(time.monotonic() - started)
    streams = await _streams(live, 5)
    live.engines[-1].raise_in_step = RuntimeError("boom")
    await asyncio.gather(*streams)
    await until(lambda: live.serving.bridge.state == "dead")
    codes = [(await live.http.get(path)).status_code for path in ("/readyz", "/healthz", "/metrics")]
    assert codes == [503, 503, 200]
    print_figures(
        "13", errors_each=1, back_after_s_at_most=round(max(seconds), 2), fourth_crash="down, liveness off, metrics on"
    )


async def test_hung_step_turns_readiness_then_liveness_off(start_server: Any) -> None:
    limits = BridgeLimits() if LONG else BridgeLimits(hang_s=0.5)
    live = await start_server(limits=limits, prepare=lambda engine: setattr(engine, "step_s", 0.02))
    streams = await _streams(live, 20)
    gate = threading.Event()
    live.engine.hang, started = gate, time.monotonic()

    async def off(path: str) -> float:
        async with asyncio.timeout(120):
            while (await live.http.get(path)).status_code == 200:
                await asyncio.sleep(0.02)
        return time.monotonic() - started

    ready_off_s, live_off_s = await asyncio.gather(off("/readyz"), off("/healthz"))
    ended = await asyncio.gather(*streams)
    assert all(one.tail.count(b'"engine_failure"') == 1 for one in ended)
    page = (await live.http.get("/metrics")).text
    assert "loractl_server_watchdog_stalls_total 1.0" in page
    assert "loractl_server_engine_up 0.0" in page
    live.engine.hang = None
    gate.set()
    await until(lambda: live.serving.is_ready)
    print_figures("14", limit_s=limits.hang_s, ready_off_s=round(ready_off_s, 1), liveness_off_s=round(live_off_s, 1))


def _tensors(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return dict(load_file(folder / WEIGHTS))


def _save(folder: Path, tensors: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _spoil(value: float, folder: Path) -> None:
    tensors = _tensors(folder)
    next(iter(tensors.values()))[0, 0] = value
    _save(folder, tensors)


def _without_b(folder: Path) -> None:
    _save(folder, {name: value for name, value in _tensors(folder).items() if "lora_A" in name})


def _renamed(old: str, new: str, folder: Path) -> None:
    _save(folder, {name.replace(old, new): value for name, value in _tensors(folder).items()})
    config = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(config.replace(old, new))


def _replaced(content: bytes, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(content)


def _configured(old: str, new: str, folder: Path) -> None:
    config = (folder / CONFIG).read_text()
    assert old in config
    (folder / CONFIG).write_text(config.replace(old, new))


@pytest.fixture(scope="module")
def crafted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base, a sound adapter, and those that no slot can take: each with one thing wrong."""
    root = tmp_path_factory.mktemp("crafted")
    base = make_tiny_base(root / "tiny")
    wide = make_tiny_base(root / "wide", hidden_size=48)
    folders = {"tiny": base, "sound": make_adapter(base, root / "sound")}

    def sound(name: str, **settings: Any) -> Path:
        folders[name] = make_adapter(base, root / name, **settings)
        return folders[name]

    _spoil(np.nan, sound("nan"))
    _spoil(np.inf, sound("inf"))
    sound("rank-above-the-slots", r=16)
    folders["another-base"] = make_adapter(wide, root / "another-base")
    _renamed("q_proj", "W_pack", sound("unknown-module", target_modules=["q_proj"]))
    _renamed("layers.1", "layers.7", sound("layer-beyond-the-base"))
    _without_b(sound("a-without-b"))
    _configured('"r": 4', '"r": 5', sound("rank-beside-the-config"))
    _configured('"lora_alpha": 8', '"lora_alpha": NaN', sound("alpha-nan"))
    _configured('"LORA"', '"VERA"', sound("another-method"))
    _replaced((folders["sound"] / WEIGHTS).read_bytes()[:-1], sound("truncated"))
    _replaced(b"\x80\x04\x95" + b"x" * 4000, sound("pickle"))
    header = {A: entry([4, 64], 0, 256, "I8"), B: entry([64, 4], 256, 512, "I8")}
    _replaced(safetensors_bytes(header, b"\x01" * 512), sound("whole-numbers"))
    _replaced(safetensors_bytes(b"{}" + b" " * 30, b""), sound("no-tensors"))
    return folders


async def test_adapter_that_cannot_be_served_fails_alone(crafted: dict[str, Path]) -> None:
    bad = [name for name in crafted if name not in {"tiny", "sound"}]
    local = {name: folder for name, folder in crafted.items() if name != "tiny"}
    async with (
        real_server(crafted["tiny"], adapters=local) as server,
        httpx.AsyncClient(base_url=server.url, timeout=60) as http,
    ):

        async def ask(model: str) -> Any:
            return await http.post("/v1/completions", json=BODY | {"model": model} | _FEW)

        expected = {name: (await ask(name)).json()["choices"][0]["text"] for name in ("tiny", "sound")}
        num_steps = (await http.get("/admin/status")).json()["num_steps"]
        refused = {name: await ask(name) for name in bad}
        for name, answer in refused.items():
            assert answer.status_code in {400, 409, 422}, (name, answer.text)
            assert answer.json()["error"]["param"] == "model", (name, answer.text)
        assert (await http.get("/admin/status")).json()["num_steps"] == num_steps
        # The same beside running requests: those come out as they do alone.
        both = await asyncio.gather(*(ask(name) for name in ["tiny", *bad, "sound"]))
        texts = [answer.json()["choices"][0]["text"] for answer in (both[0], both[-1])]
        assert texts == [expected["tiny"], expected["sound"]]
        assert (await http.get("/readyz")).status_code == 200
    print_figures("17, 18", crafted=len(bad), refused=len(refused), steps_made_for_them=0, others="as alone")
