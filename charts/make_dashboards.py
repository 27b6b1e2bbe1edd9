"""Writes the two Grafana dashboards of the chart from the tables below. Knows no Prometheus and no Grafana.

python charts/make_dashboards.py
"""

import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "loractl" / "dashboards"
BY = 'namespace=~"$namespace", job=~"$job"'
Panel = tuple[str, str, list[tuple[str, str]]]


def quantile(share: float, metric: str, *, by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({metric}_bucket{{{BY}}}[$__rate_interval])))"


def rate(metric: str, *, by: str = "job") -> str:
    return f"sum by ({by}) (rate({metric}{{{BY}}}[$__rate_interval]))"


def ratio(part: str, whole: str, *, by: str = "job") -> str:
    return f"{rate(part, by=by)} / {rate(whole, by=by)}"


def gauge(metric: str, *, by: str = "instance") -> str:
    return f"sum by ({by}) ({metric}{{{BY}}})"


S = "loractl_server_"
HITS = f'sum by (level) (rate({S}adapter_cache_requests_total{{{BY}, result="hit"}}[$__rate_interval]))'
SIDE, SIDE_LEGEND = "adapter, version, track", "{{adapter}} {{version}} {{track}}"
SERVER: dict[str, list[Panel]] = {
    "Is it well?": [
        ("Ready", "short", [(gauge(S + "ready"), "{{instance}}")]),
        ("Requests by code", "reqps", [(rate(S + "requests_total", by="code"), "{{code}}")]),
        ("Rejected by reason", "reqps", [(rate(S + "requests_rejected_total", by="reason"), "{{reason}}")]),
        (
            "Waiting and running",
            "short",
            [
                (gauge(S + "requests_waiting"), "waiting {{instance}}"),
                (gauge(S + "requests_running"), "running {{instance}}"),
            ],
        ),
    ],
    "How fast?": [
        (
            "Time to first token",
            "s",
            [(quantile(share, S + "time_to_first_token_seconds"), f"p{share * 100:g}") for share in (0.5, 0.95, 0.99)],
        ),
        (
            "Between tokens",
            "s",
            [(quantile(share, S + "inter_token_latency_seconds"), f"p{share * 100:g}") for share in (0.5, 0.95, 0.99)],
        ),
        ("Whole request, p95", "s", [(quantile(0.95, S + "e2e_request_seconds", by="stream"), "stream {{stream}}")]),
        (
            "Where the first token's time goes, p95",
            "s",
            [
                (quantile(0.95, S + "queue_seconds"), "queue"),
                (quantile(0.95, S + "adapter_wait_seconds"), "adapter"),
                (quantile(0.95, S + "prefill_seconds"), "prefill"),
            ],
        ),
        (
            "Tokens",
            "short",
            [(rate(S + "prompt_tokens_total"), "prompt"), (rate(S + "generation_tokens_total"), "generated")],
        ),
        ("Why requests wait", "short", [(gauge(S + "requests_waiting_by_reason", by="reason"), "{{reason}}")]),
    ],
    "Adapters": [
        ("Slots", "short", [(gauge(S + "adapter_slots", by="level, state"), "{{level}} {{state}}")]),
        ("Resident", "short", [(f"count by (level) ({S}adapter_resident{{{BY}}})", "{{level}}")]),
        (
            "Loads, evictions, failures",
            "ops",
            [
                (rate(S + "adapter_loads_total"), "loads"),
                (rate(S + "adapter_evictions_total", by="level"), "evictions {{level}}"),
                (rate(S + "adapter_load_failures_total"), "failures"),
            ],
        ),
        ("Load time by stage, p95", "s", [(quantile(0.95, S + "adapter_load_seconds", by="stage"), "{{stage}}")]),
        ("Failed loads by why", "ops", [(rate(S + "adapter_load_failures_total", by="reason"), "{{reason}}")]),
        (
            "Quarantined",
            "short",
            [
                (gauge(S + "adapters_quarantined", by="reason"), "adapters {{reason}}"),
                (gauge(S + "requests_quarantined", by="job"), "prompts"),
            ],
        ),
        (
            "Found, by level",
            "percentunit",
            [(f"{HITS} / {rate(S + 'adapter_cache_requests_total', by='level')}", "{{level}}")],
        ),
        (
            "Busiest adapters",
            "reqps",
            [(f"topk(10, {rate(S + 'adapter_requests_total', by='adapter')})", "{{adapter}}")],
        ),
        ("Where adapters were", "reqps", [(rate(S + "adapter_wait_seconds_count", by="outcome"), "{{outcome}}")]),
        ("Distinct adapters in a step, p95", "short", [(quantile(0.95, S + "batch_distinct_adapters"), "p95")]),
        ("Adapter memory", "bytes", [(gauge(S + "adapter_cache_bytes", by="level"), "{{level}}")]),
    ],
    "Canaries": [
        (
            "Requests by version",
            "reqps",
            [(rate(S + "canary_requests_total", by=SIDE), SIDE_LEGEND)],
        ),
        (
            "Failed share by version",
            "percentunit",
            [(ratio(S + "canary_errors_total", S + "canary_requests_total", by=SIDE), SIDE_LEGEND)],
        ),
        (
            "Seconds a token by version",
            "s",
            [(ratio(S + "canary_request_seconds_total", S + "canary_generation_tokens_total", by=SIDE), SIDE_LEGEND)],
        ),
    ],
    "Engine": [
        ("KV cache in use", "percentunit", [(gauge(S + "kv_cache_usage_ratio"), "{{instance}}")]),
        (
            "Prefix cache hits",
            "percentunit",
            [(ratio(S + "prefix_cache_hits_total", S + "prefix_cache_queries_total"), "hits")],
        ),
        ("Device memory", "bytes", [(gauge(S + "device_memory_bytes", by="kind"), "{{kind}}")]),
        ("Step, p95", "s", [(quantile(0.95, S + "step_seconds", by="phase"), "{{phase}}")]),
        ("Requests in a step, p50", "short", [(quantile(0.5, S + "batch_requests"), "p50")]),
        (
            "Trouble",
            "ops",
            [
                (rate(S + "preemptions_total"), "preemptions"),
                (rate(S + "isolated_requests_total"), "failed alone"),
                (rate(S + "nonfinite_logits_total"), "no numbers"),
                (rate(S + "oom_total"), "out of memory"),
                (rate(S + "engine_restarts_total"), "restarts"),
                (rate(S + "client_disconnects_total"), "clients gone"),
            ],
        ),
        ("Hub reachable", "short", [(gauge(S + "hub_up"), "{{instance}}")]),
        ("Hub's answer time, p95", "s", [(quantile(0.95, S + "hub_request_seconds", by="op"), "{{op}}")]),
        ("Questions to the hub", "ops", [(rate(S + "hub_requests_total", by="op, code"), "{{op}} {{code}}")]),
        ("Event loop lag, p99", "s", [(quantile(0.99, S + "event_loop_lag_seconds"), "p99")]),
    ],
}

H = "loractl_hub_"
HUB: dict[str, list[Panel]] = {
    "Is it well?": [
        ("Ready", "short", [(gauge(H + "ready"), "{{instance}}")]),
        ("Requests by code", "reqps", [(rate(H + "http_requests_total", by="code"), "{{code}}")]),
        ("Answer time by route, p95", "s", [(quantile(0.95, H + "http_request_seconds", by="route"), "{{route}}")]),
        ("In flight", "short", [(gauge(H + "http_in_flight"), "{{instance}}")]),
        ("Database failures", "ops", [(rate(H + "db_errors_total", by="kind"), "{{kind}}")]),
        ("Refused tokens", "ops", [(rate(H + "auth_failures_total", by="reason"), "{{reason}}")]),
    ],
    "Pushes and pulls": [
        ("Commits", "ops", [(rate(H + "commits_total", by="result"), "{{result}}")]),
        ("Rejected by check", "ops", [(rate(H + "validation_failures_total", by="reason"), "{{reason}}")]),
        (
            "Bytes",
            "Bps",
            [
                (rate(H + "upload_bytes_total"), "in"),
                (rate(H + "download_bytes_total", by="backend"), "out {{backend}}"),
            ],
        ),
    ],
    "What it keeps": [
        ("Repos and revisions", "short", [(gauge(H + "repos"), "repos"), (gauge(H + "revisions"), "revisions")]),
        ("Blobs", "bytes", [(gauge(H + "blob_bytes"), "stored"), (gauge(H + "storage_free_bytes"), "free")]),
        ("Blobs missing or damaged", "ops", [(rate(H + "blob_errors_total", by="kind"), "{{kind}}")]),
    ],
    "What it stands on": [
        ("Time in the store, p95", "s", [(quantile(0.95, H + "storage_seconds", by="op"), "{{op}}")]),
        ("Store failures", "ops", [(rate(H + "storage_errors_total", by="op, code"), "{{op}} {{code}}")]),
        ("Time in the database, p95", "s", [(quantile(0.95, H + "db_seconds", by="op"), "{{op}}")]),
        (
            "Upkeep",
            "dateTimeFromNow",
            [
                (gauge(H + "gc_last_success_timestamp_seconds") + " * 1000", "gc"),
                (gauge(H + "scrub_last_success_timestamp_seconds") + " * 1000", "fsck"),
            ],
        ),
        ("Bytes that were there already", "Bps", [(rate(H + "blob_dedup_bytes_total"), "not stored again")]),
        ("Told to come later", "ops", [(rate(H + "rate_limited_total", by="scope"), "{{scope}}")]),
    ],
}


def board(title: str, uid: str, anchor: str, rows: dict[str, list[Panel]]) -> dict[str, Any]:
    """One dashboard; `anchor` is the metric that names namespaces and jobs."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row, members in rows.items():
        place = {"x": 0, "y": y, "w": 24, "h": 1}
        panels.append({"type": "row", "title": row, "gridPos": place, "id": len(panels) + 1, "panels": []})
        y += 1
        for i, (name, unit, queries) in enumerate(members):
            place = {"x": i % 3 * 8, "y": y + i // 3 * 8, "w": 8, "h": 8}
            panels.append(_panel(name, unit, queries, place) | {"id": len(panels) + 1})
        y += -(-len(members) // 3) * 8
    variables = [
        _variable("namespace", f"label_values({anchor}, namespace)"),
        _variable("job", f'label_values({anchor}{{namespace=~"$namespace"}}, job)'),
    ]
    source = {"name": "datasource", "type": "datasource", "query": "prometheus"}
    return {
        "title": title,
        "uid": uid,
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "tags": ["loractl"],
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [source, *variables]},
        "panels": panels,
    }


def _panel(name: str, unit: str, queries: list[tuple[str, str]], place: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    targets = [
        {"refId": chr(ord("A") + i), "expr": expr, "legendFormat": legend, "datasource": source}
        for i, (expr, legend) in enumerate(queries)
    ]
    return {
        "type": "timeseries",
        "title": name,
        "gridPos": place,
        "datasource": source,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": targets,
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    # `.*` rather than Grafana's list of all values: a Prometheus without Kubernetes has no namespace label.
    common = {"includeAll": True, "multi": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}}
    return {"name": name, "type": "query", "datasource": source, "query": query, "refresh": 2} | common


def boards() -> dict[str, str]:
    """File name and content of each dashboard."""
    made = {
        "server.json": board("loractl server", "loractl-server", S + "ready", SERVER),
        "hub.json": board("loractl hub", "loractl-hub", H + "ready", HUB),
    }
    return {name: json.dumps(value, indent=1) + "\n" for name, value in made.items()}


if __name__ == "__main__":
    for file_name, content in boards().items():
        (FOLDER / file_name).write_text(content)
        sys.stdout.write(f"{FOLDER / file_name}\n")
