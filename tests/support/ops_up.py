"""A real Prometheus that scrapes a real hub and server and evaluates the chart's rules; ends by itself."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from chart_tools import program
from tiny_models import make_tiny_base

DASHBOARDS = Path(__file__).parents[2] / "charts" / "loractl" / "dashboards"
RULES = Path(__file__).parents[2] / "charts" / "loractl" / "rules"
PATIENCE_S = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ask(url: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read() or b"null")


def wait_for(what: str, check: Callable[[], object]) -> Any:
    """Ask again until the answer is true; raises TimeoutError with what was waited for."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            if found := check():
                return found
        except OSError:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"{what} within {PATIENCE_S:.0f} s")


def main() -> None:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        ports = {part: free_port() for part in ("hub", "server", "prometheus")}
        url = {part: f"http://127.0.0.1:{port}" for part, port in ports.items()}

        def start(part: str, *command: str) -> None:
            log = stack.enter_context((folder / f"{part}.log").open("w"))
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)

        base = make_tiny_base(folder / "tiny")
        loractl = [sys.executable, "-m", "loractl.cli"]
        start("hub", *loractl, "hub", "serve", "--root", str(folder / "hub"), "--port", str(ports["hub"]))
        serve = ["serve", str(base), "--quantize", "none", "--hub", url["hub"], "--port", str(ports["server"])]
        start("server", *loractl, *serve)
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES / "*.yaml")],
            "scrape_configs": [
                {"job_name": part, "static_configs": [{"targets": [f"127.0.0.1:{ports[part]}"]}]}
                for part in ("hub", "server")
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        start(
            "prometheus",
            str(program("prometheus", "prometheus")),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{ports['prometheus']}",
        )
        try:
            show(url)
        except (TimeoutError, OSError):
            for log in sorted(folder.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text()[-2000:]}", file=sys.stderr)
            raise


def show(url: dict[str, str]) -> None:
    """Wait for scrapes and evaluations, send some traffic, and print the state of every rule and target."""
    api = url["prometheus"] + "/api/v1"

    def targets_up() -> bool:
        found = ask(f"{api}/targets")["data"]["activeTargets"]
        return len(found) == 2 and all(target["health"] == "up" for target in found)

    def rules_evaluated() -> Any:
        found = [rule for group in ask(f"{api}/rules")["data"]["groups"] for rule in group["rules"]]
        return all(rule["health"] == "ok" for rule in found) and found

    wait_for("both targets up", targets_up)
    model = ask(url["server"] + "/v1/models")["data"][0]["id"]
    for _ in range(5):
        ask(url["server"] + "/v1/completions", {"model": model, "prompt": "the quick", "max_tokens": 4})
    rules = wait_for("every rule evaluated", rules_evaluated)
    query = f"{api}/query?query=loractl_server_generation_tokens_total"
    tokens = wait_for("traffic seen", lambda: ((r := ask(query)["data"]["result"]) and float(r[0]["value"][1])) or None)
    num_panels = show_dashboards(api)
    for rule in rules:
        print(f"{rule['health']:4} {rule.get('state', 'recording'):9} {rule['name']}")
    print(f"{num_panels} expressions of the dashboards evaluated; every metric in them was scraped")
    print(f"{len(rules)} rules evaluated by Prometheus; it saw {tokens:.0f} generated tokens; both targets are up")
    raised = [rule["name"] for rule in rules if rule.get("state") in {"pending", "firing"}]
    if raised:
        raise SystemExit(f"a healthy hub and server raise alerts: {', '.join(raised)}")


def show_dashboards(api: str) -> int:
    """Have Prometheus evaluate every expression of the boards; raises SystemExit for one that it refuses."""
    known = set(ask(f"{api}/metadata")["data"])
    expressions = dashboard_expressions()
    for expression in expressions:
        query = urllib.parse.quote(expression)
        answer = ask(f"{api}/query?query={query}")
        if answer["status"] != "success":
            raise SystemExit(f"Prometheus refuses {expression}")
        for name in re.findall(r"loractl_[a-z0-9_]+", expression):
            family = re.sub(r"_(bucket|sum|count)$", "", name)
            # Python's client announces a counter without its ending.
            if not {name, family, family.removesuffix("_total")} & known:
                raise SystemExit(f"{name} of {expression} is on neither page")
    return len(expressions)


def dashboard_expressions() -> list[str]:
    """Every expression of every panel, with the boards' variables filled in as Grafana would."""
    panels = [panel for path in sorted(DASHBOARDS.glob("*.json")) for panel in json.loads(path.read_text())["panels"]]
    filled = {"$namespace": ".*", "$job": ".*", "$__rate_interval": "1m"}
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [re.sub("|".join(map(re.escape, filled)), lambda found: filled[found[0]], text) for text in expressions]


if __name__ == "__main__":
    main()
