"""Token ids to text as they come, with stop strings. Knows one sequence's text; nothing of the model or of requests."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers.decoders import DecodeStream

# Enough of the prompt for a decoder to know whether the first new token starts with a space.
_CONTEXT_TOKENS = 6
_LONGEST_CHARACTER = 8


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text that can be shown now, and the stop string that has just been completed, if one has."""

    text: str
    stop: str | None = None


class TextStream:
    """Turns a sequence's tokens into text, holding back open characters and what may become a stop string."""

    def __init__(
        self, tokenizer: Any, *, prompt: Sequence[int], stops: Sequence[str] = (), include_stop: bool = False
    ) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(ids=list(prompt[-_CONTEXT_TOKENS:]), skip_special_tokens=True)
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held: list[int] = []  # tokens that have given no text yet
        self._text = ""
        self._num_shown = 0  # characters of `_text` that have left

    def push(self, token_id: int, *, min_tokens_reached: bool = True) -> TextPiece:
        """Add a token; stop strings that end before the minimum of tokens is reached are plain text."""
        before = len(self._text)
        self._text += self._decode(token_id)
        if not self._stops or not min_tokens_reached:
            return self._show(len(self._text))
        found = self._first_stop(from_character=before)
        if found is not None:
            start, stop = found
            end = start + len(stop) if self._include_stop else start
            self._text = self._text[:end]
            return TextPiece(self._show(end).text, stop)
        return self._show(len(self._text) - self._num_open())

    def finish(self) -> str:
        """The rest: held-back text, and an unfinished character as the replacement sign."""
        self._text += self._release()
        return self._show(len(self._text)).text

    def _decode(self, token_id: int) -> str:
        self._held.append(token_id)
        fresh: str | None = self._stream.step(self._tokenizer, token_id)
        if fresh is not None:
            self._held.clear()
            return fresh
        # No character is this long: these bytes are no text, and the decoder would hold back everything after them.
        return self._release() if len(self._held) > _LONGEST_CHARACTER else ""

    def _release(self) -> str:
        held, self._held = self._held, []
        self._stream = DecodeStream(ids=held, skip_special_tokens=True)
        text: str = self._tokenizer.decode(held, skip_special_tokens=True)
        return text

    def _show(self, until: int) -> TextPiece:
        until = max(until, self._num_shown)
        piece = self._text[self._num_shown : until]
        self._num_shown = until
        return TextPiece(piece)

    def _first_stop(self, *, from_character: int) -> tuple[int, str] | None:
        """The earliest stop string that ends in the new text; the longest of those that start together."""
        hits = []
        for stop in self._stops:
            start = self._text.find(stop, max(self._num_shown, from_character - len(stop) + 1))
            if start >= 0:
                hits.append((start, -len(stop), stop))
        if not hits:
            return None
        start, _, stop = min(hits)
        return start, stop

    def _num_open(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
