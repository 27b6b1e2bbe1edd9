"""Alert rules and dashboards: unit tests by promtool, expressions parsed, metrics that exist, a runbook entry each."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from chart_tools import ToolMissing, program
from loractl.adapters.reference import Digest
from loractl.hub.metrics import HubMetrics
from loractl.server.engine.stats import EngineStats, SlotStats
from loractl.server.engine_metrics import EngineCollector, Snapshot
from loractl.server.metrics import ServerMetrics

CHARTS = Path(__file__).parents[2] / "charts"
RULES = sorted((CHARTS / "loractl" / "rules").glob("*.yaml"))
DASHBOARDS = sorted((CHARTS / "loractl" / "dashboards").glob("*.json"))
RULE_TESTS = Path(__file__).parent / "rules_test.yaml"
NOT_OURS = {"up"}


@pytest.fixture(scope="module")
def promtool() -> Path:
    try:
        return program("promtool", "prometheus")
    except ToolMissing as missing:
        pytest.skip(str(missing))


def rules() -> list[dict[str, Any]]:
    return [rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def alerts() -> list[str]:
    return [rule["alert"] for rule in rules() if "alert" in rule]


def dashboard_expressions() -> list[str]:
    boards = [json.loads(path.read_text()) for path in DASHBOARDS]
    found = [t["expr"] for board in boards for panel in board["panels"] for t in panel.get("targets", [])]
    assert len(found) > 40
    return found


def metrics_in(expression: str) -> set[str]:
    """Names of the metrics in an expression that a real parser of PromQL accepts."""
    text = expression.replace("$__rate_interval", "5m").replace("$namespace", ".*").replace("$job", ".*")
    promql_parser.parse(text)
    return set(re.findall(r"\b(?:loractl_[a-z0-9_]+|job:[a-z0-9_:]+|up)\b", text.replace("job=~", ""))) - {"job:"}


def exported() -> set[str]:
    """Every series name on the two metrics pages, with something in each family."""
    server, hub = ServerMetrics(), HubMetrics()
    digest = Digest("sha256:" + "0" * 64)
    stats = EngineStats(slots=(SlotStats(digest=digest, rank=4, pinned=False, num_running=0),), num_slots=1)
    told = _server_gauges()
    snapshot = Snapshot(stats=stats, names={}, config={}, gauges=told["gauges"], counters=told["counters"])
    server.registry.register(EngineCollector(lambda: snapshot))
    return {name for registry in (server.registry, hub.registry) for name in _series(registry)}


def _server_gauges() -> dict[str, list[tuple[str, str, float]]]:
    source = (CHARTS.parent / "server" / "serving.py").read_text()
    gauges = re.findall(r'\(\s*"([a-z_]+)", "[^"]+", (?:float\(|bridge\.)', source)
    assert "ready" in gauges
    # Counters and gauges are told apart by how the page names them.
    counted = re.search(r"counters = \[(.*?)\n        \]", source, re.DOTALL)
    assert counted
    counters = set(re.findall(r'\(\s*"([a-z_]+)"', counted.group(1)))
    return {
        "gauges": [(name, "g", 0.0) for name in gauges if name not in counters],
        "counters": [(name, "c", 0.0) for name in counters],
    }


def _series(registry: CollectorRegistry) -> set[str]:
    names: set[str] = set()
    collectors: list[Collector] = list(registry._collector_to_names)
    for collector in collectors:
        for family in collector.collect():
            if family.type == "counter":
                names.add(f"{family.name}_total")
            elif family.type == "histogram":
                names |= {family.name + end for end in ("_bucket", "_sum", "_count")}
            else:
                names.add(family.name)
    return names


def test_rules_are_accepted_and_their_unit_tests_pass(promtool: Path, tmp_path: Path) -> None:
    for path in [*RULES, RULE_TESTS]:
        shutil.copy(path, tmp_path)
    for arguments in (["check", "rules", *(path.name for path in RULES)], ["test", "rules", RULE_TESTS.name]):
        done = subprocess.run([promtool, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_unit_test_that_fires_it() -> None:
    tests = yaml.safe_load(RULE_TESTS.read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fired == set(alerts())


def test_every_alert_has_a_runbook_entry_that_says_what_to_do() -> None:
    text = (CHARTS / "RUNBOOK.md").read_text()
    entries = dict(re.findall(r"^## (Loractl\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert set(entries) == set(alerts())
    for name, entry in entries.items():
        for part in ("**Means:**", "**Look at:**", "**Do:**"):
            assert part in entry, f"{name} lacks {part}"


def test_metrics_of_rules_and_dashboards_are_exported() -> None:
    known = exported() | {rule["record"] for rule in rules() if "record" in rule} | NOT_OURS
    for expression in [*(rule["expr"] for rule in rules()), *dashboard_expressions()]:
        names = metrics_in(expression)
        assert names, expression
        assert names <= known, f"{names - known} in {expression}"


def test_dashboards_are_what_the_tables_say() -> None:
    spec = importlib.util.spec_from_file_location("make_dashboards", CHARTS / "make_dashboards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {path.name: path.read_text() for path in DASHBOARDS} == module.boards()


def test_promtool_finds_no_fault_with_the_metrics(promtool: Path) -> None:
    server, hub = ServerMetrics(), HubMetrics()
    told = _server_gauges()
    snapshot = Snapshot(stats=EngineStats(), names={}, config={}, gauges=told["gauges"], counters=told["counters"])
    server.registry.register(EngineCollector(lambda: snapshot))
    for page in (server.page(), hub.text()):
        done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
