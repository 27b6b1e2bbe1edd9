"""Breaks text between words as it streams to a terminal, which itself breaks anywhere. Knows no conversation."""

from collections.abc import Callable

from rich.cells import cell_len


class WordWrap:
    """Writes what it is fed; a word is held back until it has ended, since only then its line is known."""

    def __init__(self, write: Callable[[str], None], *, width: int) -> None:
        self._write = write
        self._width = width
        self._column = 0
        self._word = ""

    def feed(self, text: str) -> None:
        for character in text:
            if character == "\n":
                self.end_word()
                self._write("\n")
                self._column = 0
            elif character == " ":
                self.end_word()
                # At the edge the line break stands for it.
                if self._column < self._width:
                    self._write(" ")
                    self._column += 1
            else:
                self._word += character
                # Scripts without spaces break anywhere, and so must a word that is longer than a line.
                if cell_len(character) > 1 or cell_len(self._word) >= self._width:
                    self.end_word()

    def end_word(self) -> None:
        """Write the word that is held back."""
        cells = cell_len(self._word)
        if self._column and self._column + cells > self._width:
            self._write("\n")
            self._column = 0
        if self._word:
            self._write(self._word)
        self._column += cells
        self._word = ""
