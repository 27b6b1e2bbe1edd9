"""What a training run says while it runs; whoever listens decides how a person sees it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The data is read and the model is ready."""

    num_rows: int
    num_eval_rows: int
    num_overlong_rows: int
    num_tokens: int
    num_learned_tokens: int
    num_parameters: int
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """One optimizer step is done; `loss` is per learned token over the whole step."""

    step: int
    num_steps: int
    loss: float
    learning_rate: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """Mean loss per learned token over the held-out rows, in eval mode."""

    step: int
    loss: float


Progress = Started | Stepped | Evaluated
Listener = Callable[[Progress], None]
