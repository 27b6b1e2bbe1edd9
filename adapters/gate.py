"""A gate: what a new adapter's metric must be, beside a number or an older revision's. Knows no hub and no files."""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loractl.adapters.errors import BadData, CheckFailed, UsageError

_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_GATE = re.compile(r"^\s*(?P<metric>\w+)\s*(?P<sign>>=|<=|>|<)\s*(?P<other>[\w.-][^\s<>=]*)\s*$")
PREVIOUS = "prev"


@dataclass(frozen=True, slots=True)
class Gate:
    """`metric sign other`: `other` is a number, a revision, or `prev` for what the channel points to now."""

    metric: str
    sign: str
    other: str

    @property
    def number(self) -> float | None:
        """The other side, where it is a number."""
        try:
            return float(self.other)
        except ValueError:
            return None

    def check(self, ours: Mapping[str, float], theirs: Mapping[str, float] | None) -> str:
        """Say in a line that the gate is passed; raises CheckFailed, or BadData where a metric is missing."""
        mine = _metric(self.metric, ours, whose="the adapter")
        bar = self.number
        if bar is None:
            bar = _metric(self.metric, theirs or {}, whose=self.other)
        line = f"{self.metric} {mine:.4g} {self.sign} {bar:.4g} ({self.other})"
        if not _COMPARE[self.sign](mine, bar):
            raise CheckFailed(
                f"the gate is closed: not {line}", check="E_GATE", hint="nothing was pushed; without --gate it would be"
            )
        return f"gate passed: {line}"


def parse_gate(text: str) -> Gate:
    """Read `accuracy>=prod` or `eval_loss<=prev`; raises UsageError."""
    found = _GATE.match(text)
    if not found:
        raise UsageError(
            f"--gate {text!r} is not METRIC>=REVISION", hint='for example "accuracy>=prod", "eval_loss<=prev"'
        )
    return Gate(found["metric"], found["sign"], found["other"])


def _metric(name: str, metrics: Mapping[str, float], *, whose: str) -> float:
    for known in (name, f"eval_{name}"):
        if known in metrics:
            return metrics[known]
    raise BadData(
        f"{whose} has no metric {name}: it has {', '.join(sorted(metrics)) or 'none'}",
        hint="`loractl eval DIR --data FILE --record` writes accuracy and loss into its manifest",
    )
