"""A healthy hub and server, scraped by a real Prometheus, let every rule evaluate and no alert rise."""

from pathlib import Path

import pytest
import yaml

import ops_up
from chart_tools import ToolMissing, program

RULES = Path(__file__).parents[2] / "charts" / "loractl" / "rules"


@pytest.mark.slow
@pytest.mark.e2e
def test_ops_up_evaluates_every_rule_and_raises_no_alert(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        program("prometheus", "prometheus")
    except ToolMissing as missing:
        pytest.skip(str(missing))
    ops_up.main()
    groups = [group for path in RULES.glob("*.yaml") for group in yaml.safe_load(path.read_text())["groups"]]
    assert f"{sum(len(group['rules']) for group in groups)} rules evaluated" in capsys.readouterr().out
