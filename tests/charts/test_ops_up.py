"""A healthy hub and server, scraped by a real Prometheus, let every rule evaluate and no alert rise."""

import pytest

import ops_up
from chart_tools import ToolMissing, program


@pytest.mark.slow
@pytest.mark.e2e
def test_ops_up_evaluates_every_rule_and_raises_no_alert(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        program("prometheus", "prometheus")
    except ToolMissing as missing:
        pytest.skip(str(missing))
    ops_up.main()
    assert "29 rules evaluated" in capsys.readouterr().out
