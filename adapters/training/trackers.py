"""Sends a run's figures to TensorBoard or trackio, which are imported only where somebody asked for them."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from loractl.adapters.errors import UsageError
from loractl.adapters.training.events import Evaluated, Progress, Stepped

Tracker = Callable[[str, Progress], None]


def figures(event: Progress) -> tuple[int, dict[str, float]] | None:
    """Return an event's step and figures, None for an event that has none."""
    if not isinstance(event, Stepped | Evaluated):
        return None
    side = "train" if isinstance(event, Stepped) else "eval"
    names = ("loss", "learning_rate", "tokens_per_s", "reward_margin", "reward_accuracy")
    found = {f"{side}/{name}": getattr(event, name, None) for name in names}
    return event.step, {name: value for name, value in found.items() if value is not None}


@contextmanager
def trackers(*, tensorboard: Path | None, trackio: str | None) -> Iterator[Sequence[Tracker]]:
    """Open what was asked for; each tracker takes (run, event). Raises UsageError where a package is missing."""
    with ExitStack() as stack:
        opened = []
        if tensorboard is not None:
            opened.append(stack.enter_context(_tensorboard(tensorboard)))
        if trackio is not None:
            opened.append(stack.enter_context(_trackio(trackio)))
        yield opened


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Tracker]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("--tensorboard needs the package tensorboard", hint="pip install tensorboard") from error
    writers: dict[str, Any] = {}

    def track(run: str, event: Progress) -> None:
        if (found := figures(event)) is not None:
            if run not in writers:
                writers[run] = SummaryWriter(str(folder / run))
            for name, value in found[1].items():
                writers[run].add_scalar(name, value, found[0])

    try:
        yield track
    finally:
        for writer in writers.values():
            writer.close()


@contextmanager
def _trackio(project: str) -> Iterator[Tracker]:
    try:
        trackio: Any = importlib.import_module("trackio")
    except ImportError as error:
        raise UsageError("--trackio needs the package trackio", hint="pip install trackio") from error
    runs: dict[str, Any] = {}

    def track(run: str, event: Progress) -> None:
        if (found := figures(event)) is not None:
            if run not in runs:
                runs[run] = trackio.init(project=project, name=run)
            runs[run].log(found[1], step=found[0])

    try:
        yield track
    finally:
        for run in runs.values():
            run.finish()
