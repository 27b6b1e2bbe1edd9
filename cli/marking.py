"""Shows which text is learned: bold beside dim on a terminal, **between stars** off it."""

import sys
from collections.abc import Sequence

import click


def marked(pieces: Sequence[tuple[str, bool]], *, max_chars: int | None = None, err: bool = True) -> str:
    """Return the pieces (text, learned) as one text for stderr, or for stdout; the end stays where it is shortened."""
    stream = sys.stderr if err else sys.stdout
    shown = [(_shortened(text, max_chars) if not learned else text, learned) for text, learned in pieces]
    if not stream.isatty():
        return "".join(f"**{text}**" if learned else text for text, learned in shown)
    return "".join(click.style(text, bold=learned, dim=not learned) for text, learned in shown)


def _shortened(text: str, max_chars: int | None) -> str:
    return (
        text
        if max_chars is None or len(text) <= max_chars
        else f"{text[: max_chars // 2]} ... {text[-max_chars // 2 :]}"
    )
