"""Draws a run's losses as an SVG picture, by hand: a line, dots and four labels need no plotting library."""

from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT, _MARGIN = 640, 320, 48


def loss_svg(curve: Sequence[tuple[int, float]], evals: Sequence[tuple[int, float]], *, title: str) -> str:
    """Return the picture: training loss as a line, held-out losses as dots, both over optimizer steps."""
    points = [*curve, *evals]
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    low, high = min(losses), max(losses)
    high = high if high > low else low + 1.0
    last = max(steps)

    def x(step: int) -> float:
        return _MARGIN + (_WIDTH - 2 * _MARGIN) * (step - 1) / max(1, last - 1)

    def y(loss: float) -> float:
        return _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * (loss - low) / (high - low)

    line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in curve)
    dots = "".join(
        f'<circle cx="{x(step):.1f}" cy="{y(loss):.1f}" r="4" fill="#c2410c"><title>held out, step {step}: {loss:.4f}'
        "</title></circle>"
        for step, loss in evals
    )
    left, bottom, right = _MARGIN, _HEIGHT - _MARGIN, _WIDTH - _MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>'
        f'<text x="{left}" y="24" font-size="14">{escape(title)}</text>'
        f'<path d="M{left} {_MARGIN}V{bottom}H{right}" fill="none" stroke="#9ca3af"/>'
        f'<text x="8" y="{_MARGIN + 4}">{high:.3g}</text><text x="8" y="{bottom + 4}">{low:.3g}</text>'
        f'<text x="{left}" y="{bottom + 18}">step 1</text>'
        f'<text x="{right}" y="{bottom + 18}" text-anchor="end">{last}</text>'
        f'<polyline points="{line}" fill="none" stroke="#1d4ed8" stroke-width="1.5"/>{dots}</svg>\n'
    )
