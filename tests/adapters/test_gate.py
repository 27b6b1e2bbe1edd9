"""A gate lets the better pass and nothing that it cannot judge."""

import pytest

from loractl.adapters.errors import BadData, CheckFailed, UsageError
from loractl.adapters.gate import parse_gate


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
        assert "gate passed" in gate.check(ours, theirs)
    else:
        with pytest.raises(CheckFailed, match="the gate is closed"):
            gate.check(ours, theirs)


def test_missing_metric_closes_the_gate_and_says_which_there_are() -> None:
    with pytest.raises(BadData, match="prod has no metric accuracy: it has eval_loss"):
        parse_gate("accuracy>=prod").check({"eval_accuracy": 1.0}, {"eval_loss": 0.1})


@pytest.mark.parametrize("text", ["accuracy", "accuracy=>prod", ">=prod", "accuracy>="])
def test_gate_that_cannot_be_meant_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_gate(text)
