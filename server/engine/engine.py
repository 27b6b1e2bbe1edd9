"""The engine's public face: requests in, events out, one step at a time. Knows nothing of HTTP, JSON and names."""

from pathlib import Path

from loractl.adapters.reference import Digest
from loractl.server.engine.base_model import BaseModel
from loractl.server.engine.messages import AdapterUse, Cancel, Submit
from loractl.server.engine.settings import EngineSettings
from loractl.server.engine.stats import EngineStats, StepResult


class Engine:
    """Continuous batching of many adapters on one base.

    `step`, `check_books` and `close` belong to one thread, the engine's; everything else may be called from any
    thread and never waits for a step.
    """

    def __init__(self, base: BaseModel, settings: EngineSettings) -> None:
        self.base = base
        self.settings = settings

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens, prompt and output together."""
        raise NotImplementedError

    def submit(self, request: Submit) -> None:
        """Queue a request; raises Overloaded when the queue is full, BadRequest for what can never run."""
        raise NotImplementedError

    def cancel(self, request: Cancel) -> None:
        """End a request at the next step; unknown and ended ids are ignored."""
        raise NotImplementedError

    def wait_for_work(self, timeout_s: float) -> bool:
        """Wait until `step` has something to do; False after `timeout_s` seconds without."""
        raise NotImplementedError

    def step(self) -> StepResult:
        """Run one forward pass over what is due, and return what came of it. Never waits for a load."""
        raise NotImplementedError

    def stats(self) -> EngineStats:
        """A snapshot of queues, slots, tiers and counters."""
        raise NotImplementedError

    def resolve_adapter(self, folder: Path) -> None:
        """Check that this engine can serve the adapter in `folder`; raises Incompatible or AdapterInvalid with why."""
        raise NotImplementedError

    def prefetch(self, use: AdapterUse) -> None:
        """Begin to bring an adapter near, ahead of the request that will need it."""
        raise NotImplementedError

    def pin(self, digest: Digest) -> None:
        """Keep an adapter in its slot; raises NotFound if the engine never saw it, WillNotFit if no slot may be pinned."""
        raise NotImplementedError

    def unpin(self, digest: Digest) -> None:
        """Let an adapter be evicted again."""
        raise NotImplementedError

    def unload(self, digest: Digest) -> None:
        """Forget an adapter on every tier as soon as no request runs with it."""
        raise NotImplementedError

    def check_books(self) -> None:
        """Raise BooksError unless every block and slot is accounted for."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop the loaders; requests that are left are forgotten."""
        raise NotImplementedError
