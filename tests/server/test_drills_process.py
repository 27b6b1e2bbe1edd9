"""Faults on purpose against a server in a process of its own: slow clients, floods, signals, a clock that jumps.

Clients and server each have their own limit of open files; the engine is a fake that echoes prompts.
"""

import asyncio
import contextlib
import json
import random
import resource
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from drill_server import DrillServer, drill_server
from drills import LONG, Streamed, encoded, head, print_figures, share, stream, until

pytestmark = pytest.mark.drill

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 1)


def _samples(server: DrillServer) -> dict[str, float]:
    """The server's metrics, those with labels summed."""
    total: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=20).text):
        for sample in family.samples:
            total[sample.name] = total.get(sample.name, 0.0) + sample.value
    return total


async def _drip(port: int, opening: bytes, drop: bytes) -> None:
    """Send `opening`, then drop by drop, reading all that comes, until the server cuts the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError):
        writer.write(opening)
        while True:
            writer.write(drop)
            try:
                async with asyncio.timeout(0.2):
                    if not await reader.read(4096):
                        break
            except TimeoutError:
                continue
    writer.close()


def _never_read(port: int, body: bytes) -> socket.socket:
    """Ask for a stream and leave all of it in the smallest buffer there is."""
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    reader.connect(("127.0.0.1", port))
    reader.sendall(head(len(body)) + body)
    return reader


async def test_slow_clients_are_cut_while_others_are_answered(tmp_path: Path, many_files: None) -> None:
    num_slow, num_readers = (500, 100) if LONG else (40, 10)
    timeouts = {"header_timeout_s": 15.0, "body_timeout_s": 30.0, "write_timeout_s": 30.0} if LONG else {}
    short = {"header_timeout_s": 1.0, "body_timeout_s": 1.0, "write_timeout_s": 1.0}
    with drill_server(tmp_path / "log", settings=timeouts or short, send_buffer=4096, step_s=0.001) as server:
        body = encoded(max_tokens=4, stream=True)

        async def ask(times: int) -> list[float]:
            asked = [await stream(server.port, body) for _ in range(times)]
            assert {one.status for one in asked} == {200}
            return [one.first_s for one in asked]

        before = await ask(100)
        num_files = server.num_files
        # What the server generates for readers costs others too, however fast they read: that is told apart.
        wide = encoded(max_tokens=480, logprobs=5, stream=True)
        quick = [asyncio.create_task(stream(server.port, wide)) for _ in range(num_readers)]
        beside_quick = await ask(100)
        assert {one.status for one in await asyncio.gather(*quick)} == {200}
        request_line = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-slow: "
        slow = [asyncio.create_task(_drip(server.port, request_line, b"x")) for _ in range(num_slow)]
        slow += [asyncio.create_task(_drip(server.port, head(10_000), b" ")) for _ in range(num_slow)]
        beside_senders = await ask(100)
        readers = [await asyncio.to_thread(_never_read, server.port, wide) for _ in range(num_readers)]
        during = await ask(100)
        started = time.monotonic()
        await asyncio.wait_for(asyncio.gather(*slow), 120)
        await until(lambda: _samples(server)["loractl_server_open_streams"] == 0, 120)
        # The answer to the scrape itself may still hold one.
        await until(lambda: server.num_files <= num_files + 1, 120)
        all_cut_s = time.monotonic() - started
        stalls = _samples(server)["loractl_server_sse_write_stalls_total"]
        for reader in readers:
            reader.close()
        assert stalls == num_readers
        print_figures(
            "8",
            slow_headers=num_slow,
            slow_bodies=num_slow,
            readers_that_never_read=num_readers,
            p99_ms_without=_ms(share(before, 0.99)),
            p99_ms_beside_senders=_ms(share(beside_senders, 0.99)),
            p99_ms_beside_quick_readers=_ms(share(beside_quick, 0.99)),
            p99_ms_beside_them=_ms(share(during, 0.99)),
            all_cut_after_s=round(all_cut_s, 1),
        )


async def test_overload_refuses_the_rest_and_serves_what_it_took(tmp_path: Path, many_files: None) -> None:
    seconds, cap = (60.0, 12) if LONG else (3.0, 12)
    with drill_server(tmp_path / "log", step_s=0.02, max_running=4, max_queue=cap) as server:
        body = encoded(max_tokens=8, stream=True)
        chance = random.Random(9)
        capacity = 4 / (8 * 0.02)
        deepest = 0

        async def watch() -> None:
            nonlocal deepest
            async with httpx.AsyncClient(base_url=server.url) as http:
                while True:
                    page = (await http.get("/metrics/routing")).text
                    lines = [line for line in page.splitlines() if line.startswith("loractl_server_requests_")]
                    deepest = max(deepest, int(sum(float(line.split()[1]) for line in lines)))
                    await asyncio.sleep(0.05)

        async def offer(rate: float) -> list[Streamed]:
            asked: list[asyncio.Task[Streamed]] = []
            ends = time.monotonic() + seconds
            due = time.monotonic()
            while due < ends:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                asked.append(asyncio.create_task(stream(server.port, body)))
                due += chance.expovariate(rate)
            return await asyncio.gather(*asked)

        once = await offer(capacity)
        rss_mib = server.rss_mib
        watcher = asyncio.create_task(watch())
        tenfold = await offer(10 * capacity)
        watcher.cancel()
        codes = Counter(one.status for one in tenfold)
        assert set(codes) == {200, 429}
        assert all(b"retry-after: " in one.head for one in tenfold if one.status == 429)
        assert all(one.is_whole for one in tenfold if one.status == 200)
        assert 0 < deepest <= cap
        taken = [one.first_s for one in tenfold if one.status == 200]
        print_figures(
            "9",
            requests=len(tenfold),
            served=codes[200],
            refused=codes[429],
            deepest_queue=f"{deepest}/{cap}",
            ttft_p99_ms_at_1x=_ms(share([one.first_s for one in once if one.status == 200], 0.99)),
            ttft_p99_ms_at_10x=_ms(share(taken, 0.99)),
            refusal_p99_ms=_ms(share([one.first_s for one in tenfold if one.status == 429], 0.99)),
            rss_mib=f"{rss_mib:.0f} to {server.rss_mib:.0f}",
        )


async def test_many_streams_at_once_all_finish(tmp_path: Path, many_files: None) -> None:
    num_streams = 10_000 if LONG else 500
    with drill_server(tmp_path / "log", max_queue=20_000) as server:
        body, started = encoded(stream=True, max_tokens=4), time.monotonic()
        streams = (stream(server.port, body, started=started) for _ in range(num_streams))
        ended = await asyncio.gather(*streams)
        seconds = time.monotonic() - started
        assert Counter((one.status, one.is_whole) for one in ended) == {(200, True): num_streams}
        await until(lambda: _samples(server)["loractl_server_open_streams"] == 0)
        firsts = [one.first_s for one in ended]
        print_figures(
            "10",
            finished=f"{len(ended)}/{num_streams}",
            seconds=round(seconds, 1),
            first_token_p50_s=round(share(firsts, 0.5), 2),
            first_token_p99_s=round(share(firsts, 0.99), 2),
            server_peak_rss_mib=round(server.peak_rss_mib),
        )


async def _started_streams(server: DrillServer, number: int, **changes: object) -> "list[asyncio.Task[Streamed]]":
    tasks = [asyncio.create_task(stream(server.port, encoded(stream=True, **changes))) for _ in range(number)]
    await until(lambda: httpx.get(f"{server.url}/metrics/routing").text.count(f"requests_running {number}\n") == 1)
    return tasks


async def test_sigterm_lets_streams_finish_and_refuses_new_requests(tmp_path: Path) -> None:
    settings = {"drain_grace_s": 0.5, "drain_timeout_s": 60}
    with drill_server(tmp_path / "log", step_s=0.02, settings=settings) as server:
        streams = await _started_streams(server, 50, max_tokens=60)
        # A connection from before, as a balancer's: the listener itself must still answer too.
        async with httpx.AsyncClient(base_url=server.url) as http:
            assert (await http.get("/readyz")).status_code == 200
            server.signal(signal.SIGTERM)
            started = time.monotonic()
            while (await http.get("/readyz")).status_code == 200:
                await asyncio.sleep(0.001)
            ready_off_s = time.monotonic() - started
            assert (await http.get("/healthz")).status_code == 200
        refused = await stream(server.port, encoded(stream=True))
        assert refused.status == 503
        assert b"retry-after: " in refused.head
        ended = await asyncio.gather(*streams)
        assert Counter((one.status, one.is_whole) for one in ended) == {(200, True): 50}
        assert await asyncio.to_thread(server.process.wait, 20) == 0
        print_figures("11", streams=50, cut=0, ready_off_after_ms=_ms(ready_off_s), exit_code=0)


async def test_streams_beyond_the_drain_timeout_end_with_an_error_event(tmp_path: Path) -> None:
    with drill_server(tmp_path / "log", step_s=0.02, settings={"drain_timeout_s": 0.3}) as server:
        streams = await _started_streams(server, 50, max_tokens=480)
        server.signal(signal.SIGTERM)
        ended = await asyncio.gather(*streams)
        assert all(b'"draining"' in one.tail and not one.is_whole for one in ended)
        assert await asyncio.to_thread(server.process.wait, 20) == 0
        print_figures("11, timeout", streams=50, ended_by_an_error_event=len(ended), exit_code=0)


async def test_second_sigterm_ends_at_once(tmp_path: Path) -> None:
    with drill_server(tmp_path / "log", step_s=0.05, settings={"drain_timeout_s": 300}) as server:
        streams = await _started_streams(server, 10, max_tokens=480)
        server.signal(signal.SIGTERM)
        await until(lambda: httpx.get(f"{server.url}/readyz").status_code == 503)
        started = time.monotonic()
        server.signal(signal.SIGTERM)
        code = await asyncio.to_thread(server.process.wait, 20)
        seconds = time.monotonic() - started
        ended = await asyncio.gather(*streams)
        # 480 tokens at 50 ms had 24 s to go: nobody waited for them.
        assert not any(one.is_whole for one in ended)
        print_figures("12", ended_after_s=round(seconds, 2), exit_code=code)


@pytest.mark.skipif(not FAKETIME.is_file(), reason="libfaketime comes from Debian")
async def test_clock_that_jumps_a_day_changes_no_duration(tmp_path: Path) -> None:
    shift = tmp_path / "shift"
    shift.write_text("+0d")
    keys = tmp_path / "keys"
    keys.write_text("a-key-for-drills-1\n")
    environment = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(shift),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    with drill_server(tmp_path / "log", environment=environment, step_s=0.01, keys=str(keys)) as server:
        headers = {"authorization": "Bearer a-key-for-drills-1"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=30) as http:
            seen: list[int] = []
            for place in ("+0d", "+1d", "-1d"):
                body = json.loads(encoded(max_tokens=100))
                running = asyncio.create_task(http.post("/v1/completions", json=body))
                await asyncio.sleep(0.2)
                # The old name is replaced at once: a half-written file would be another time.
                (tmp_path / "next").write_text(place)
                (tmp_path / "next").rename(shift)
                answer = await running
                assert answer.json()["usage"]["completion_tokens"] == 100, answer.text
                body["max_tokens"] = 1
                seen.append((await http.post("/v1/completions", json=body)).json()["created"] - int(time.time()))
        assert [round(offset / 86400) for offset in seen] == [0, 1, -1], "the clock did not jump"
        samples = _samples(server)
        sums = {name: value for name, value in samples.items() if name.endswith("_seconds_sum")}
        assert sums["loractl_server_e2e_request_seconds_sum"] > 0
        assert all(0 <= value < 3600 for value in sums.values()), sums
        print_figures("23", shifts="0, +1 day, -1 day", refused=0, longest_histogram_sum_s=round(max(sums.values()), 2))
