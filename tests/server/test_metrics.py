"""What operators see is true, bounded and well formed."""

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from loractl.adapters.local_cache import AdapterCache
from loractl.adapters.reference import Digest
from loractl.server.access import Key
from loractl.server.engine.stats import EngineCounters, EngineStats, LoadRecord, SlotStats, StepRecord
from loractl.server.engine_metrics import EngineCollector, Snapshot, routing_page
from loractl.server.metrics import OTHER, AdapterLabels, ServerMetrics


async def _samples(live: Any) -> dict[str, float]:
    page = (await live.http.get("/metrics")).text
    return {
        sample.name + "".join(f"[{key}={value}]" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


async def test_page_counts_what_was_served(live: Any) -> None:
    for model in ("tiny", "cats"):
        await live.openai.completions.create(model=model, prompt="a fox", max_tokens=5)
    await live.http.post("/v1/completions", json={"model": "nobody", "prompt": "x"})
    samples = await _samples(live)
    prefix = "loractl_server_"
    assert samples[f"{prefix}requests_total[code=200][endpoint=/v1/completions]"] == 2
    assert samples[f"{prefix}requests_total[code=404][endpoint=/v1/completions]"] == 1
    assert samples[f"{prefix}requests_rejected_total[reason=adapter_not_found]"] == 1
    assert samples[f"{prefix}generation_tokens_total"] == 10
    assert samples[f"{prefix}requests_finished_total[finish_reason=length]"] == 2
    assert samples[f"{prefix}adapter_requests_total[adapter=cats]"] == 1
    assert samples[f"{prefix}adapter_resident[adapter=cats][level=gpu]"] == 1
    assert samples[f"{prefix}time_to_first_token_seconds_count[stream=false]"] == 2
    assert samples[f"{prefix}batch_distinct_adapters_max"] == 1
    assert samples[f"{prefix}ready"] == 1


async def test_no_histogram_has_an_adapter_label(live: Any) -> None:
    await live.openai.completions.create(model="cats", prompt="a fox", max_tokens=5)
    page = (await live.http.get("/metrics")).text
    for family in text_string_to_metric_families(page):
        if family.type == "histogram":
            assert not any("adapter" in sample.labels for sample in family.samples)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Debian's prometheus")
async def test_promtool_finds_nothing_to_say(live: Any) -> None:
    await live.openai.completions.create(model="cats", prompt="a fox", max_tokens=5)
    page = (await live.http.get("/metrics")).content
    checked = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


async def test_routing_page_is_lean_and_tells_what_is_resident(live: Any) -> None:
    await live.openai.completions.create(model="cats", prompt="a fox", max_tokens=2)
    page = (await live.http.get("/metrics/routing")).text
    assert len(page) < 2000
    samples = {sample.name: sample for family in text_string_to_metric_families(page) for sample in family.samples}
    labels = samples["loractl_server_lora_requests_info"].labels
    assert labels == {"max_lora": "8", "running_lora_adapters": "cats", "waiting_lora_adapters": ""}


def test_page_of_five_hundred_adapters_stays_small() -> None:
    metrics = ServerMetrics()
    digests = [Digest(f"sha256:{number:064x}") for number in range(500)]
    slots = tuple(SlotStats(digest=digest, rank=8, pinned=False, num_running=0) for digest in digests)
    names = {digest: f"team/adapter-{number}@prod" for number, digest in enumerate(digests)}
    for name in names.values():
        label = metrics.labels.label(name)
        metrics.adapter_requests.labels(label).inc()
        metrics.adapter_tokens.labels(label, "prompt").inc()
        metrics.adapter_tokens.labels(label, "generation").inc()
    metrics.saw_step(
        StepRecord(seconds=0.1, num_tokens=9, num_prefill_tokens=4, num_requests=3, num_distinct_adapters=2)
    )
    snapshot = Snapshot(stats=EngineStats(slots=slots, num_slots=500), names=names, config={})
    metrics.registry.register(EngineCollector(lambda: snapshot))
    seconds, page = list[float](), b""
    for _ in range(5):
        started = time.monotonic()
        page = metrics.page()
        seconds.append(time.monotonic() - started)
    print(f"500 adapters: {len(page):,} bytes in {sorted(seconds)[2] * 1e3:.1f} ms")
    assert len(page) < 500_000
    assert metrics.labels.num_overflows == 300
    assert routing_page(snapshot).count("\n") == 10


async def test_adapters_wait_is_told_by_where_it_was(live: Any) -> None:
    for _ in range(2):
        await live.openai.completions.create(model="cats", prompt="a fox", max_tokens=2)
    await live.openai.completions.create(model="tiny", prompt="a fox", max_tokens=2)
    samples = await _samples(live)
    found = {
        tier: samples[f"loractl_server_adapter_wait_seconds_count[outcome={tier}]"]
        for tier in ("hit_gpu", "hit_host", "hit_disk", "miss")
    }
    assert found == {"hit_gpu": 1, "hit_host": 0, "hit_disk": 1, "miss": 0}


async def test_series_are_there_before_their_first_event(live: Any) -> None:
    samples = await _samples(live)
    prefix = "loractl_server_"
    for reason in ("queue_full", "rate_limit", "draining", "too_long", "adapter_not_found", "hub_down"):
        assert samples[f"{prefix}requests_rejected_total[reason={reason}]"] == 0
    assert samples[f"{prefix}requests_total[code=500][endpoint=/v1/chat/completions]"] == 0
    assert samples[f"{prefix}hub_requests_total[code=unreachable][op=fetch]"] == 0
    assert samples[f"{prefix}aborted_tokens_total[stage=decode]"] == 0


async def test_refusal_by_quota_is_not_a_full_queue(start_server: Any) -> None:
    live = await start_server(adapter_limits=Key(requests_per_minute=1))
    for _ in range(2):
        await live.http.post("/v1/completions", json={"model": "cats", "prompt": "x", "max_tokens": 1})
    samples = await _samples(live)
    assert samples["loractl_server_requests_rejected_total[reason=rate_limit]"] == 1
    assert samples["loractl_server_requests_rejected_total[reason=queue_full]"] == 0


def test_disk_cache_is_told_with_its_limit(tmp_path: Path) -> None:
    cache = AdapterCache(tmp_path, max_bytes=5000)
    folder = tmp_path / "sha256" / ("a" * 64)
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 1234)
    snapshot = Snapshot(stats=EngineStats(), names={}, config={})
    families = {family.name: family for family in EngineCollector(lambda: snapshot, disk=cache).collect()}
    sizes = {sample.labels["level"]: sample.value for sample in families["loractl_server_adapter_cache_bytes"].samples}
    assert sizes == {"host": 0, "disk": 1234}
    limits = families["loractl_server_adapter_cache_limit_bytes"].samples
    assert {sample.labels["level"]: sample.value for sample in limits} == {"host": 0, "disk": 5000}


def test_troubles_of_adapters_and_memory_are_told() -> None:
    counters = EngineCounters(num_adapter_evictions=5, num_host_evictions=2, num_nonfinite=3, num_out_of_memory=4)
    stats = EngineStats(quarantined_adapters={"oom": 2}, num_quarantined_requests=1, counters=counters)
    snapshot = Snapshot(stats=stats, names={}, config={}, device_memory={"weights": 70, "kv": 20})
    metrics = ServerMetrics()
    metrics.registry.register(EngineCollector(lambda: snapshot))
    metrics.saw_load(LoadRecord(read_s=0.2, copy_s=0.004))
    metrics.saw_load(LoadRecord(fault="base"))
    metrics.saw_hub_call("resolve", "ok", 0.01)
    metrics.saw_hub_call("fetch", "adapter_invalid", 0.3)
    metrics.saw_hub_call("fetch", "timeout", 0.3)
    metrics.saw_cache_stage("fill", 0.25)
    metrics.saw_cache_stage("verify", 0.05)
    told = {
        (sample.name.removeprefix("loractl_server_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics.page().decode())
        for sample in family.samples
    }
    stages = ("lookup", "download", "verify", "read", "copy")
    sums = {stage: told["adapter_load_seconds_sum", stage] for stage in stages}
    assert sums == {"lookup": 0.01, "download": 0.25, "verify": 0.05, "read": 0.2, "copy": 0.004}
    failures = {key[1]: value for key, value in told.items() if key[0] == "adapter_load_failures_total" and value}
    assert failures == {"base": 1, "digest": 1, "hub": 1}
    assert told["adapters_quarantined", "oom"] == 2
    assert told["adapters_quarantined", "invalid"] == 0
    assert told["requests_quarantined",] == 1
    assert told["device_memory_bytes", "kv"] == 20
    assert (told["oom_total",], told["nonfinite_logits_total",]) == (4, 3)
    assert (told["adapter_evictions_total", "gpu"], told["adapter_evictions_total", "host"]) == (5, 2)


def test_label_of_an_idle_adapter_makes_room() -> None:
    now = [0.0]
    labels = AdapterLabels(2, idle_s=60, clock=lambda: now[0])
    dropped: list[str] = []
    labels.on_drop(dropped.append)
    assert [labels.label(name) for name in ("a", "b", "c")] == ["a", "b", OTHER]
    now[0] = 100.0
    assert labels.label("b") == "b"
    assert labels.label("c") == "c"
    assert dropped == ["a"]


async def test_vllms_names_are_told_to_those_who_want_them(start_server: Any, live: Any) -> None:
    assert "vllm:" not in (await live.http.get("/metrics")).text + (await live.http.get("/metrics/routing")).text
    other = await start_server(vllm_metrics=True)
    await other.openai.completions.create(model="cats", prompt="a fox", max_tokens=5)
    families = {one.name: one for one in text_string_to_metric_families((await other.http.get("/metrics")).text)}
    for ours, theirs in (
        ("requests_running", "num_requests_running"),
        ("time_to_first_token_seconds", "time_to_first_token_seconds"),
        ("e2e_request_seconds", "e2e_request_latency_seconds"),
    ):
        own, alias = families[f"loractl_server_{ours}"], families[f"vllm:{theirs}"]
        assert [sample.value for sample in alias.samples] == [sample.value for sample in own.samples]
        assert alias.type == own.type
        assert {sample.labels["model_name"] for sample in alias.samples} == {"tiny"}
    assert {name for name in families if name.startswith("vllm:")} == {
        f"vllm:{name}"
        for name in (
            *("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc", "cache_config_info"),
            *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
        )
    }
    routing = text_string_to_metric_families((await other.http.get("/metrics/routing")).text)
    labels = {one.name: one.samples[0].labels for one in routing}
    assert labels["vllm:lora_requests_info"] == labels["loractl_server_lora_requests_info"]
