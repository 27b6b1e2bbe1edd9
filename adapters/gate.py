"""A gate: what a new adapter's metric must be, beside a number or an older revision's. Knows no hub and no files."""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loractl.adapters.errors import BadData, CheckFailed, UsageError
from loractl.adapters.manifest import Manifest

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

    def check(self, ours: Manifest, theirs: Manifest | None) -> str:
        """Say in a line that the gate is passed.

        Raises CheckFailed, or BadData where a metric is missing or was measured on other rows.
        """
        name, mine = _metric(self.metric, ours, whose="the adapter")
        bar = self.number
        if bar is None:
            theirs = theirs or Manifest()
            other_name, bar = _metric(self.metric, theirs, whose=self.other)
            if name.startswith("eval_"):
                self._check_rows(ours.measured_on.get(name), theirs.measured_on.get(other_name))
        line = f"{self.metric} {mine:.4g} {self.sign} {bar:.4g} ({self.other})"
        if not _COMPARE[self.sign](mine, bar):
            raise CheckFailed(
                f"the gate is closed: not {line}", check="E_GATE", hint="nothing was pushed; without --gate it would be"
            )
        return f"gate passed: {line}"

    def _check_rows(self, ours: str | None, theirs: str | None) -> None:
        if ours and ours == theirs:
            return
        rows = [f"rows {digest[:19]}" if digest else "rows that nothing tells of" for digest in (ours, theirs)]
        raise BadData(
            f"{self.metric} cannot be compared: the adapter's is of {rows[0]}, {self.other}'s of {rows[1]}",
            hint="`loractl eval DIR --data FILE --record` before each push, always with the same rows",
        )


def parse_gate(text: str) -> Gate:
    """Read `accuracy>=prod` or `eval_loss<=prev`; raises UsageError."""
    found = _GATE.match(text)
    if not found:
        raise UsageError(
            f"--gate {text!r} is not METRIC>=REVISION", hint='for example "accuracy>=prod", "eval_loss<=prev"'
        )
    return Gate(found["metric"], found["sign"], found["other"])


def _metric(name: str, manifest: Manifest, *, whose: str) -> tuple[str, float]:
    metrics = manifest.metrics
    for known in (name, f"eval_{name}"):
        if known in metrics:
            return known, metrics[known]
    raise BadData(
        f"{whose} has no metric {name}: it has {', '.join(sorted(metrics)) or 'none'}",
        hint="`loractl eval DIR --data FILE --record` writes accuracy and loss into its manifest",
    )
