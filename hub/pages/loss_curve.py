"""A loss curve as the points of a small drawing. Knows numbers, no page."""

from dataclasses import dataclass

WIDTH, HEIGHT = 640, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 628, 12, 186
_MAX_POINTS = 400
_NUM_TICKS = 4
_BEYOND = 1e30


@dataclass(frozen=True, slots=True)
class Tick:
    """A line across the drawing and its number."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class LossCurve:
    """Ready to draw in a box of WIDTH x HEIGHT."""

    raw: str
    """Points `x,y x,y ...` of every step that is drawn."""
    smooth: str
    """Likewise, averaged over the neighbours."""
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    first: float
    last: float
    num_steps: int


def loss_curve(recorded: object) -> LossCurve | None:
    """Lay out a manifest's `loss_curve`; None unless it is at least two pairs of finite numbers, steps growing."""
    pairs = _pairs(recorded)
    if len(pairs) < 2:
        return None
    smoothed = _smoothed([loss for _, loss in pairs])
    stride = -(-len(pairs) // _MAX_POINTS)
    kept = sorted({*range(0, len(pairs), stride), len(pairs) - 1})
    low, high = _span([pairs[index][1] for index in kept])
    first, last = pairs[0][0], pairs[-1][0]

    def x(step: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (step - first) / (last - first)

    def y(loss: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * (loss - low) / (high - low)

    def points(losses: list[float]) -> str:
        return " ".join(f"{x(pairs[index][0]):.1f},{y(losses[index]):.1f}" for index in kept)

    steps = [first + (last - first) * part / _NUM_TICKS for part in range(_NUM_TICKS + 1)]
    losses = [low + (high - low) * part / _NUM_TICKS for part in range(_NUM_TICKS + 1)]
    return LossCurve(
        raw=points([loss for _, loss in pairs]),
        smooth=points(smoothed),
        x_ticks=tuple(Tick(x(step), f"{step:,.0f}") for step in steps),
        y_ticks=tuple(Tick(y(loss), f"{loss:.3g}") for loss in losses),
        first=pairs[0][1],
        last=smoothed[-1],
        num_steps=int(last),
    )


def _pairs(recorded: object) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for pair in recorded if isinstance(recorded, list) else []:
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(one) in {int, float} for one in pair)):
            return []
        step, loss = float(pair[0]), float(pair[1])
        # Beyond any real loss, and small enough that no difference of two is infinite.
        if not (abs(step) < _BEYOND and abs(loss) < _BEYOND) or (found and step <= found[-1][0]):
            return []
        found.append((step, loss))
    return found


def _smoothed(losses: list[float]) -> list[float]:
    """A running mean that forgets, without the bias of its first steps."""
    keep = 1.0 - 1.0 / max(2.0, len(losses) / 40)
    total = weight = 0.0
    smoothed: list[float] = []
    for loss in losses:
        total, weight = keep * total + loss, keep * weight + 1.0
        smoothed.append(total / weight)
    return smoothed


def _span(losses: list[float]) -> tuple[float, float]:
    low, high = min(losses), max(losses)
    if low == high:
        return low - 0.5, high + 0.5
    return (0.0 if 0 < low < (high - low) else low), high
