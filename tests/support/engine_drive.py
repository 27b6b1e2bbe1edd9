"""Drives an engine in the test's own thread until its requests have ended."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from loractl.adapters.digest import folder_digest
from loractl.server.engine.engine import Engine
from loractl.server.engine.messages import AdapterUse, Event, Failed, Finished, RequestId, Submit, Token
from loractl.server.engine.stats import StepRecord


def adapter_use(folder: Path, *, weight: float = 1.0) -> AdapterUse:
    """Name the adapter in a folder as a request does."""
    return AdapterUse(digest=folder_digest(folder), folder=folder, weight=weight)


@dataclass(slots=True)
class Outcome:
    """Everything that came for one request."""

    tokens: list[Token] = field(default_factory=list[Token])
    ends: list[Finished | Failed] = field(default_factory=list[Finished | Failed])

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    @property
    def finished(self) -> Finished:
        (end,) = self.ends
        assert isinstance(end, Finished), end
        return end

    @property
    def failed(self) -> Failed:
        (end,) = self.ends
        assert isinstance(end, Failed), end
        return end

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens) + self.finished.text


@dataclass(slots=True)
class Drive:
    """Outcomes by request, and the steps that ran."""

    engine: Engine
    outcomes: dict[RequestId, Outcome] = field(default_factory=dict[RequestId, Outcome])
    records: list[StepRecord] = field(default_factory=list[StepRecord])

    def submit(self, requests: Iterable[Submit]) -> None:
        for request in requests:
            self.outcomes[request.id] = Outcome()
            self.engine.submit(request)

    def once(self) -> None:
        if not self.engine.wait_for_work(0.1):
            return
        result = self.engine.step()
        for event in result.events:
            self._take(event)
        if result.record is not None:
            self.records.append(result.record)
        self.engine.check_books()

    def until_ended(self, *, timeout_s: float = 60.0) -> None:
        until = time.monotonic() + timeout_s
        while not all(outcome.ends for outcome in self.outcomes.values()):
            assert time.monotonic() < until, f"still open: {self.engine.stats()}"
            self.once()

    def _take(self, event: Event) -> None:
        outcome = self.outcomes[event.id]
        assert not outcome.ends, f"{event} after the end"
        if isinstance(event, Token):
            outcome.tokens.append(event)
        else:
            outcome.ends.append(event)
