"""What a training run says while it runs; whoever listens decides how a person sees it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loractl.adapters.training.data_summary import DataSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The data is read and the model is ready."""

    data: DataSummary
    preview: Sequence[tuple[str, bool]] = ()
    """One row as text, in pieces that are learned or not; for a person's eyes, never for a log."""
    num_parameters: int
    num_steps: int
    num_processes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """One optimizer step is done; `loss` is per learned token over the whole step, or per pair."""

    step: int
    num_steps: int
    loss: float
    learning_rate: float
    tokens_per_s: float
    reward_margin: float | None = None
    """Of pairs: by how much chosen answers were rewarded above rejected ones."""
    reward_accuracy: float | None = None
    """Of pairs: the share whose chosen answer had the higher reward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """Mean loss per learned token, or per pair, over the held-out rows, in eval mode."""

    step: int
    loss: float
    reward_margin: float | None = None
    reward_accuracy: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint is on the disk; from here the run can go on after whatever happens."""

    step: int
    folder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """The run goes on after this many steps."""

    step: int
    folder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunk:
    """Memory ran out: fewer rows at a time from now on, as many rows a step as before."""

    step: int
    num_rows: int
    rows_per_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """The run ended before its last step: early stopping, or an error that ends this run alone."""

    step: int
    reason: str
    failed: bool


Progress = Started | Stepped | Evaluated | Saved | Resumed | Shrunk | Stopped
Listener = Callable[[Progress], None]
