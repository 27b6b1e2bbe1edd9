"""A gate lets the better pass and nothing that it cannot judge."""

import pytest

from loractl.adapters.errors import BadData, CheckFailed, UsageError
from loractl.adapters.gate import parse_gate
from loractl.adapters.manifest import Manifest

_ROWS = "sha256:" + "1" * 64


def _manifest(metrics: dict[str, float] | None, *, rows: str | None = _ROWS) -> Manifest:
    return Manifest(metrics=metrics or {}, measured_on=dict.fromkeys(metrics or {}, rows) if rows else {})


@pytest.mark.parametrize(
    ("text", "ours", "theirs", "passes"),
    [
        ("accuracy>=prod", {"eval_accuracy": 0.9}, {"eval_accuracy": 0.9}, True),
        ("accuracy>=prod", {"eval_accuracy": 0.89}, {"eval_accuracy": 0.9}, False),
        ("eval_loss <= prev", {"eval_loss": 0.5}, {"eval_loss": 0.6}, True),
        ("eval_loss<prev", {"eval_loss": 0.6}, {"eval_loss": 0.6}, False),
        ("accuracy>0.8", {"accuracy": 0.81}, None, True),
        ("accuracy>0.8", {"accuracy": 0.8}, None, False),
    ],
)
def test_gate_compares_our_metric_with_theirs(
    text: str, ours: dict[str, float], theirs: dict[str, float] | None, passes: bool
) -> None:
    gate = parse_gate(text)
    if passes:
        assert "gate passed" in gate.check(_manifest(ours), _manifest(theirs) if theirs else None)
    else:
        with pytest.raises(CheckFailed, match="the gate is closed"):
            gate.check(_manifest(ours), _manifest(theirs) if theirs else None)


def test_missing_metric_closes_the_gate_and_says_which_there_are() -> None:
    with pytest.raises(BadData, match="prod has no metric accuracy: it has eval_loss"):
        parse_gate("accuracy>=prod").check(_manifest({"eval_accuracy": 1.0}), _manifest({"eval_loss": 0.1}))


@pytest.mark.parametrize("rows", [None, "sha256:" + "2" * 64])
def test_figures_of_other_rows_close_the_gate_but_for_a_number(rows: str | None) -> None:
    ours, theirs = _manifest({"eval_accuracy": 0.95}), _manifest({"eval_accuracy": 0.9}, rows=rows)
    with pytest.raises(BadData, match="accuracy cannot be compared: the adapter's is of rows sha256:1111"):
        parse_gate("accuracy>=prod").check(ours, theirs)
    assert "gate passed" in parse_gate("accuracy>=0.9").check(ours, theirs)


@pytest.mark.parametrize("text", ["accuracy", "accuracy=>prod", ">=prod", "accuracy>="])
def test_gate_that_cannot_be_meant_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_gate(text)
