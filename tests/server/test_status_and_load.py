"""`loractl status` and `loractl bench serve` against a live server with a fake engine."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from loractl.cli.load import Load, pick_models, run_load, summarize
from loractl.cli.main import run
from loractl.server.access import Access


async def _command(*words: str) -> int:
    return await asyncio.to_thread(run, list(words))


async def test_status_tells_speed_queues_and_residency(live: Any, capsys: pytest.CaptureFixture[str]) -> None:
    live.engine.step_s = 0.01
    body = {"model": "cats", "prompt": "a quick brown fox", "max_tokens": 100, "ignore_eos": True}
    asked = asyncio.create_task(live.http.post("/v1/completions", json=body))
    assert await _command("status", "--server", live.url, "--interval", "0.1") == 0
    await asked
    first, second, *table = capsys.readouterr().out.splitlines()
    assert first.startswith("tiny (none): ready, hub none, ")
    assert "tokens/s out" in first
    assert second.startswith("running ")
    assert "slots 1/8" in second
    assert table[0].split() == ["NAME", "LEVEL", "RANK", "PINNED", "RUNNING", "DIGEST"]
    assert table[1].split()[:2] == ["cats", "device"]


async def test_status_is_one_document_with_the_rates_when_json_is_asked_for(
    live: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await _command("status", "--server", live.url, "--interval", "0.1", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ready"] is True
    assert document["per_s"] == {"generated": 0.0, "prompt": 0.0, "steps": 0.0}


async def test_status_prints_one_line_a_look_when_watched_through_a_pipe(live: Any) -> None:
    command = [sys.executable, "-m", "loractl.cli", "status", "--server", live.url, "--watch", "--interval", "0.1"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    lines = [await asyncio.wait_for(process.stdout.readline(), 20) for _ in range(3)]
    process.terminate()
    await process.wait()
    assert all(line.startswith(b"tiny (none): ready") and b"; running 0" in line for line in lines)


async def test_status_says_who_may_ask_when_the_key_is_not_an_admins(
    start_server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-0123456789abcdef\n")
    live = await start_server(access=Access.from_file(keys))
    code = await _command("status", "--server", live.url, "--key", "sk-0123456789abcdef")
    assert code == 8
    assert "admin" in capsys.readouterr().err


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/"])
async def test_status_finds_the_server_by_any_way_to_write_its_address(live: Any, tail: str) -> None:
    address = live.url.removeprefix("http://") + tail
    assert await _command("status", "--server", address, "--interval", "0.1", "--json") == 0


@pytest.mark.parametrize("address", ["ftp://x", "http://", "http://x:99999", "http://[x"])
async def test_status_refuses_what_is_no_address(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert await _command("status", "--server", address) == 2
    assert "is no address" in capsys.readouterr().err


@pytest.mark.parametrize("arrival", [["--concurrency", "4"], ["--rate", "200"]], ids=["closed", "open"])
async def test_bench_counts_every_token_and_every_model(
    start_server: Any, capsys: pytest.CaptureFixture[str], arrival: list[str]
) -> None:
    # Steps that take no time send an answer in one piece, which has no time between its tokens.
    live = await start_server(prepare=lambda engine: setattr(engine, "step_s", 0.005))
    words = ["--requests", "20", "--prompt-tokens", "7", "--output-tokens", "5", "--popularity", "zipf:1.0"]
    assert await _command("bench", "serve", "--server", live.url, *words, *arrival) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["requests"] == 20
    assert figures["failures"] == {}
    assert figures["output_tokens"] == 100
    assert set(figures["by_model"]) == {"cats", "dogs"}
    assert sum(figures["by_model"].values()) == 20
    assert all(len(each.prompt) == 7 and each.sampling.ignore_eos for each in live.engine.submitted)
    for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
        assert 0 < figures[name]["p50"] <= figures[name]["p95"] <= figures[name]["p99"]


async def test_bench_times_are_those_of_the_steps(start_server: Any) -> None:
    live = await start_server(prepare=lambda engine: setattr(engine, "step_s", 0.02))
    load = Load(models=["tiny"], num_requests=4, concurrency=4, prompt_tokens=4, output_tokens=16)
    seen, seconds = await run_load(live.url, None, load)
    assert all(each.tpot_s is not None and each.tpot_s >= 0.02 for each in seen)
    assert all(each.chunks_s[0] - each.started_s >= 0.02 for each in seen)
    assert summarize(seen, seconds)["output_tokens_per_s"] <= 4 / 0.02


async def test_bench_counts_failures_by_cause_and_fails_when_nothing_was_answered(
    live: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await _command("bench", "serve", "--server", live.url, "--model", "nobody", "--requests", "3") == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["failures"] == {"404": 3}
    assert "no request was answered" in captured.err


def test_zipf_prefers_the_first_models_and_uniform_none() -> None:
    models = [f"m{number}" for number in range(10)]
    zipf = pick_models(Load(models=models, num_requests=3000, zipf=1.0))
    even = pick_models(Load(models=models, num_requests=3000))
    assert zipf.count("m0") > 2 * zipf.count("m2") > 0
    assert 200 < min(map(even.count, models)) <= max(map(even.count, models)) < 400


async def test_unknown_popularity_is_refused_with_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert await _command("bench", "serve", "--popularity", "pareto") == 2
    assert "zipf:EXPONENT" in capsys.readouterr().err
