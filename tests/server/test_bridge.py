"""Every request gets exactly one end, whatever happens to the engine or the client."""

import asyncio
import threading
import time
from pathlib import Path
from typing import Any, cast

import httpx
import openai
import pytest

from loractl.server import assemble
from loractl.server.bridge import Bridge, BridgeLimits
from loractl.server.engine.base_model import load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.messages import Event, Failed, Sampling, Submit, Token
from loractl.server.engine.settings import EngineSettings
from tiny_models import make_tiny_base

LONG = {"model": "tiny", "prompt": "a quick brown fox", "max_tokens": 400, "ignore_eos": True}


async def _until(condition: Any, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def _slow(engine: Any) -> None:
    engine.step_s = 0.02


def test_operator_says_how_long_a_step_may_take(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "tiny-base")
    checked = assemble.check(assemble.Choices(base=str(base), max_step_s=120.0))
    serving = assemble.assemble(checked, make_engine=cast(Any, None), prompts=cast(Any, None))
    assert serving.bridge.limits == BridgeLimits(stall_s=40.0, hang_s=120.0)


async def test_plain_request_is_cancelled_when_its_client_leaves(start_server: Any) -> None:
    live = await start_server(prepare=_slow)
    with pytest.raises(httpx.ReadTimeout):
        await live.http.post("/v1/completions", json=LONG, timeout=0.3)
    await _until(lambda: live.engine.cancelled)
    await _until(lambda: live.serving.bridge.num_open == 0)
    assert live.serving.num_requests == 0


async def test_stream_is_cancelled_when_its_client_leaves(start_server: Any) -> None:
    live = await start_server(prepare=_slow)
    async with live.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
        async for _ in response.aiter_lines():
            break
    await _until(lambda: live.engine.cancelled)
    await _until(lambda: live.serving.bridge.num_open == 0)
    assert live.serving.num_requests == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_engine_that_fails_ends_its_requests_and_is_built_anew(start_server: Any, stream: bool) -> None:
    live = await start_server(prepare=_slow)
    asked = asyncio.create_task(live.http.post("/v1/completions", json=LONG | {"stream": stream}))
    await _until(lambda: live.engine.submitted)
    await asyncio.sleep(0.1)
    live.engine.raise_in_step = RuntimeError("boom")
    response = await asked
    if stream:
        assert '"engine_failure"' in response.text
    else:
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "engine_failure"
    await _until(lambda: live.serving.bridge.state == "running")
    again = await live.http.post("/v1/completions", json=LONG | {"max_tokens": 2})
    assert again.status_code == 200
    assert len(live.engines) == 2
    assert live.engines[0].is_closed


async def test_engine_that_fails_again_and_again_stays_down(start_server: Any) -> None:
    def breaks(engine: Any) -> None:
        engine.raise_in_step = RuntimeError("boom")

    live = await start_server(prepare=breaks, limits=BridgeLimits(max_restarts=2))
    for _ in range(3):
        await _until(lambda: live.serving.bridge.state in {"running", "dead"})
        response = await live.http.post("/v1/completions", json=LONG)
        assert response.status_code == 500
    await _until(lambda: live.serving.bridge.state == "dead")
    assert (await live.http.get("/readyz")).status_code == 503
    assert (await live.http.get("/healthz")).status_code == 503
    # Whoever is called must still be able to look.
    page = (await live.http.get("/metrics")).text
    assert "loractl_server_ready 0.0" in page
    assert "loractl_server_requests_running 0.0" in page
    status = await live.http.get("/admin/status")
    assert status.json()["state"] == "dead"
    refused = await live.http.post("/v1/completions", json=LONG)
    assert refused.status_code == 503


async def test_hung_step_turns_readiness_off_and_ends_requests(start_server: Any) -> None:
    live = await start_server(limits=BridgeLimits(hang_s=0.3))
    gate = threading.Event()
    live.engine.hang = gate
    response = await live.http.post("/v1/completions", json=LONG)
    assert response.status_code == 500
    assert (await live.http.get("/readyz")).status_code == 503
    refused = await live.http.post("/v1/completions", json=LONG)
    assert (refused.status_code, "hung" in refused.text) == (503, True)
    assert len(live.engines) == 1  # compiled code is not interrupted, and no second engine works beside it
    gate.set()
    await _until(lambda: live.serving.bridge.state == "running")
    assert (await live.http.get("/readyz")).status_code == 200
    assert len(live.engines) == 2
    assert (await live.http.post("/v1/completions", json=LONG | {"max_tokens": 2})).status_code == 200


async def test_long_step_turns_readiness_off_and_ends_no_request(start_server: Any) -> None:
    live = await start_server(limits=BridgeLimits(stall_s=0.1))
    gate = threading.Event()
    live.engine.hang = gate
    asked = asyncio.create_task(live.http.post("/v1/completions", json=LONG | {"max_tokens": 2}))
    await _until(lambda: not live.serving.bridge.is_ready)
    live.engine.hang = None
    gate.set()
    assert (await asked).status_code == 200
    await _until(lambda: live.serving.bridge.is_ready)
    assert live.engines == [live.engine]


async def test_step_that_hangs_in_python_is_interrupted_and_the_engine_built_anew_on_its_weights(
    tmp_path: Path,
) -> None:
    base = load_base(make_tiny_base(tmp_path / "base"), quantization="none", dtype="float32")
    bridge = Bridge(lambda: Engine(base, EngineSettings(num_slots=1, kv_bytes=1 << 20)))
    await bridge.start()
    sampling = Sampling(max_tokens=4, temperature=0.0, ignore_eos=True)

    async def answer() -> list[Event]:
        ticket = bridge.open([Submit(id=bridge.new_id(), prompt=(5, 9, 40), sampling=sampling)])
        return [event async for batch in ticket.events() for event in batch]

    before = await answer()
    first = bridge.engine
    hook = base.model.register_forward_pre_hook(_spin)
    patient, bridge.limits = bridge.limits, BridgeLimits(hang_s=0.3)  # not before: a busy machine's steps are slow too
    (hung,) = await answer()
    bridge.limits = patient
    assert isinstance(hung, Failed)
    await _until(lambda: bridge.state == "running" and bridge.engine is not first)
    hook.remove()
    after = await answer()
    assert _ids(after) == _ids(before)
    assert len(_ids(after)) == 4
    assert (bridge.num_hangs, bridge.num_restarts) == (1, 1)
    assert cast("Engine", bridge.engine).base.model is base.model
    await bridge.stop()


def _ids(events: list[Event]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, Token)]


def _spin(*_: object) -> None:
    while True:
        time.sleep(0.001)


async def test_drain_finishes_streams_and_refuses_new_requests(start_server: Any) -> None:
    live = await start_server(prepare=_slow)
    stream = await live.openai.completions.create(model="tiny", prompt="a quick brown fox", max_tokens=40, stream=True)
    pieces = [await anext(stream.__aiter__())]
    live.uvicorn.handle_exit(15, None)
    await _until(lambda: live.serving.is_draining)
    assert (await live.http.get("/readyz")).status_code == 503
    assert (await live.http.get("/healthz")).status_code == 200
    with pytest.raises(openai.InternalServerError) as caught:
        await live.openai.completions.create(model="tiny", prompt="x")
    assert caught.value.status_code == 503
    assert "retry-after" in caught.value.response.headers
    pieces += [piece async for piece in stream]
    assert pieces[-1].choices[0].finish_reason == "length"
    await asyncio.wait_for(live.task, 10)


async def test_drain_ends_streams_with_an_error_after_its_timeout(start_server: Any) -> None:
    live = await start_server(prepare=_slow, drain_timeout_s=0.2)
    asked = asyncio.create_task(live.http.post("/v1/completions", json=LONG | {"stream": True}))
    await _until(lambda: live.engine.submitted)
    live.uvicorn.handle_exit(15, None)
    assert '"draining"' in (await asked).text


async def test_refused_choice_leaves_nothing_running(start_server: Any) -> None:
    def small(engine: Any) -> None:
        engine.max_queue = 2

    live = await start_server(prepare=small)
    response = await live.http.post("/v1/completions", json=LONG | {"n": 3})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"
    await _until(lambda: len(live.engine.cancelled) == 2)
    assert live.serving.bridge.num_open == 0
