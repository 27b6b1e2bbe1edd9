"""Finds the one part of a step that breaks it, and computes the others all the same. Knows parts, no requests.

Rows do not depend on their neighbours, so what is computed in pieces is what the whole step would have given.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from loractl.server.engine.runner import Part

log = logging.getLogger("loractl.server.engine")

_MAX_CULPRITS = 2
"""More broken parts than this are no parts' fault: the rest of the step is given up."""


Output = TypeVar("Output")


@dataclass(slots=True)
class Contained(Generic[Output]):
    """What came of a step: the parts that were computed together with what it gave, and those that broke it."""

    runs: list[tuple[Sequence[int], Output]] = field(default_factory=list)
    broken: dict[int, Exception] = field(default_factory=dict[int, Exception])


def run_contained(run: Callable[[Sequence[Part]], Output], parts: Sequence[Part]) -> Contained[Output]:
    """Compute all parts; where that fails, blame the part that makes it fail and compute the rest.

    One broken part among n costs at most log2(n) + 1 more runs.
    """
    result: Contained[Output] = Contained()
    error = _attempt(run, parts, range(len(parts)), result)
    if error is not None:
        log.error("a step failed; looking for the request that makes it fail", exc_info=error)
    suspects: Sequence[int] = range(len(parts))
    while error is not None:
        if len(result.broken) >= _MAX_CULPRITS:
            result.broken |= dict.fromkeys(suspects, error)
            break
        suspects, error = _blame_one(run, parts, suspects, error, result)
    return result


def _blame_one(
    run: Callable[[Sequence[Part]], Output],
    parts: Sequence[Part],
    suspects: Sequence[int],
    error: Exception,
    result: Contained[Output],
) -> tuple[Sequence[int], Exception | None]:
    """Halve the suspects down to one, then run those that were put aside; returns them and their error, if any."""
    aside: list[int] = []
    is_sure = len(parts) == 1
    while len(suspects) > 1:
        left, right = suspects[: len(suspects) // 2], suspects[len(suspects) // 2 :]
        failure = _attempt(run, parts, left, result)
        if failure is None:
            suspects, is_sure = right, False
        else:
            aside += right
            suspects, error, is_sure = left, failure, True
    # A failure of the whole that no piece repeats, as memory that was short, has no culprit. So has one that the last
    # suspect alone does not repeat.
    needs_proof = not is_sure and (not aside or isinstance(error, MemoryError | torch.OutOfMemoryError))
    failure = _attempt(run, parts, suspects, result) if needs_proof else error
    if failure is not None:
        result.broken[suspects[0]] = failure
    return aside, _attempt(run, parts, aside, result) if aside else None


def attempt(run: Callable[[], Output]) -> Output | Exception:
    """Return what `run` gives, or the error that it raises."""
    try:
        return run()
    except Exception as error:  # noqa: BLE001  whatever a model's code raises belongs to one of a step's parts
        return error


def _attempt(
    run: Callable[[Sequence[Part]], Output], parts: Sequence[Part], chosen: Sequence[int], result: Contained[Output]
) -> Exception | None:
    output = attempt(lambda: run([parts[place] for place in chosen]))
    if isinstance(output, Exception):
        return output
    result.runs.append((chosen, output))
    return None
