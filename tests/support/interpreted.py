"""The card's path of the engine on machines without a card, in Triton's interpreter (tests/conftest.py asks for it)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton")
HAS_CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CARD else "cpu")


class RunsAgain:
    """A recorder's double: what was recorded is computed once more, on what the buffers hold then."""

    def __init__(self) -> None:
        self.num_recorded = 0

    def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.num_recorded += 1
        return run


@contextmanager
def card_path() -> Iterator[None]:
    """Let engines that are built and run inside take the card's path; without a card, graphs are their double."""
    from loractl.server.engine import decode_graphs
    from loractl.server.engine.kernels import device

    with pytest.MonkeyPatch.context() as patch:
        if not HAS_CARD:
            patch.setattr(device, "runs_on_card", lambda _: True)
            patch.setattr(decode_graphs, "make_recorder", lambda _: RunsAgain())
        yield
