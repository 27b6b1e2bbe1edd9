"""What other threads ask of the engine between two steps. Knows no order among requests: that is the scheduler's."""

from collections import deque
from dataclasses import dataclass, field

from loractl.adapters.reference import Digest
from loractl.server.engine.constraint import TokenGate
from loractl.server.engine.messages import AdapterUse, RequestId, Submit


@dataclass(slots=True)
class Commands:
    """Everything asked since the last step; guarded by the engine's lock, and taken whole."""

    submits: deque[tuple[Submit, TokenGate | None]] = field(default_factory=deque[tuple[Submit, TokenGate | None]])
    cancels: deque[RequestId] = field(default_factory=deque[RequestId])
    uses: deque[AdapterUse] = field(default_factory=deque[AdapterUse])
    unloads: deque[Digest] = field(default_factory=deque[Digest])

    @property
    def has_any(self) -> bool:
        return bool(self.submits or self.cancels or self.uses or self.unloads)
