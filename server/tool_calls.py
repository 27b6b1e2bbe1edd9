"""Reads tool calls out of an answer as it comes, in the format that the base's template teaches. Knows no HTTP.

Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as often as wanted, text before them.
Llama 3: the whole answer is `{"name": ..., "parameters": {...}}`, several with `;` between them.
Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, or `[TOOL_CALLS]name[ARGS]{...}`.
"""

import json
import uuid
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

ToolFormat = Literal["hermes", "llama3", "mistral"]

MARKERS: dict[ToolFormat, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama3": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]", "[ARGS]"),
}
"""What a format writes around its calls. Where these are special tokens, they are no part of the engine's text."""

_OPENINGS: dict[ToolFormat, str] = {"hermes": "<tool_call>", "llama3": "{", "mistral": "[TOOL_CALLS]"}
_SPACE = " \t\r\n"
_SEPARATORS: dict[ToolFormat, str] = {"hermes": _SPACE, "llama3": _SPACE + ";", "mistral": _SPACE + "[,"}


def tool_format_of(chat_template: str | None) -> ToolFormat | None:
    """Say how a template teaches its base to call tools; None where it does not, or in a format not read here."""
    template = chat_template or ""
    if "tools" not in template or "<function=" in template:
        return None
    if "<tool_call>" in template:
        return "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<|python_tag|>" in template or '"parameters": dictionary of argument' in template:
        return "llama3"
    return None


def forced_opening(wanted: ToolFormat, name: str | None, *, is_begun: bool = False) -> str:
    """The beginning of an answer that must be a call, of this tool if it is named; it becomes part of the prompt.

    `is_begun`: only what a named beginning has beyond an unnamed one.
    """
    arguments = "parameters" if wanted == "llama3" else "arguments"
    openings: dict[ToolFormat, str] = {"hermes": "<tool_call>\n", "llama3": "", "mistral": "[TOOL_CALLS]["}
    begun = openings[wanted] + '{"name": "'
    if name is None:
        return begun
    rest = json.dumps(name)[1:] + f', "{arguments}": '
    return rest if is_begun else begun + rest


@dataclass(slots=True)
class CallPart:
    """A piece of one call: its id and name in the first piece, and then its arguments as JSON text, bit by bit."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Read:
    """What a reader made of some text: plain content, and pieces of calls."""

    content: str = ""
    calls: list[CallPart] = field(default_factory=list[CallPart])


class _CallObject:
    """Scans one JSON object of a call, character by character: finds the name, and gives the arguments as they are."""

    def __init__(self, *, name: str | None = None) -> None:
        self.name = name
        self.raw = ""
        self.is_closed = False
        self._fresh = ""
        self._depth = 0
        self._string: list[str] | None = None
        self._escaped = False
        self._key: str | None = None
        self._in_value = False
        # Mistral's `name[ARGS]{...}` is nothing but the arguments.
        self._bare = name is not None
        self._passes = self._bare
        self.has_arguments = self._bare

    def take(self, character: str) -> None:
        self.raw += character
        if self._passes:
            self._fresh += character
        if self._string is not None:
            self._take_in_string(character)
            return
        if character == '"':
            self._string = [character]
        elif character in "{[":
            self._depth += 1
            if self._depth == 2 and self._is_arguments and not self._passes:
                self._passes = self.has_arguments = True
                self._fresh += character
        elif character in "}]":
            self._depth -= 1
            if self._depth == 1 and self._passes and not self._bare:
                self._passes, self._in_value = False, False
            self.is_closed = self._depth == 0
        elif self._depth == 1 and character == ":":
            self._in_value = True
        elif self._depth == 1 and character == ",":
            self._in_value, self._key = False, None

    def fresh(self) -> str:
        """The arguments' text that has come since the last time; nothing before the name is known."""
        if self.name is None:
            return ""
        text, self._fresh = self._fresh, ""
        return text

    @property
    def _is_arguments(self) -> bool:
        return self._in_value and self._key in {"arguments", "parameters"}

    def _take_in_string(self, character: str) -> None:
        assert self._string is not None
        self._string.append(character)
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            text, self._string = "".join(self._string), None
            if self._depth == 1 and not self._bare:
                self._saw_string(text)

    def _saw_string(self, text: str) -> None:
        try:
            value = json.loads(text)
        except ValueError:
            return
        if not self._in_value:
            self._key = value
        elif self._key == "name":
            self.name = value
        elif self._is_arguments:
            # Some models write the arguments as a string that holds the object.
            self.has_arguments = True
            self._fresh += value


class ToolCallReader:
    """Splits one sequence's text into content and calls. Feed it text as it comes, then `finish`.

    `forced` is what `forced_opening` put before the answer. What looks like a call and is none becomes content again.
    """

    def __init__(self, wanted: ToolFormat, *, names: Collection[str], forced: str = "") -> None:
        self.num_calls = 0
        self._format: ToolFormat = wanted
        self._names = frozenset(names)
        self._buffer = ""
        self._call: _CallObject | None = None
        self._is_announced = False
        self._in_calls = False
        self._began = False
        self.forced = self.feed(forced)
        """What the forced beginning gave."""

    def feed(self, text: str) -> Read:
        """Take more text; gives what is certain now."""
        read = Read()
        self._buffer += text
        while self._step(read):
            pass
        return read

    def finish(self) -> Read:
        """The rest, when the answer has ended: half a marker was text, half a call stays half a call."""
        read = Read()
        if self._call is not None:
            if not self._is_announced:
                read.content += self._as_text(self._call)
            self._call = None
        elif not self._in_calls:
            read.content += self._buffer
        elif self._format == "hermes" and not self._is_announced:
            read.content += _OPENINGS["hermes"] + self._buffer
        self._buffer = ""
        return read

    def _step(self, read: Read) -> bool:
        if self._call is not None:
            return self._in_call(self._call, read)
        if self._in_calls:
            return self._between(read)
        return self._in_text(read)

    def _in_text(self, read: Read) -> bool:
        """Before any call: content, up to the format's opening."""
        opening = _OPENINGS[self._format]
        if self._format == "llama3":
            return self._begin_llama(read)
        if self.num_calls:
            # Line breaks between calls are no content.
            self._buffer = self._buffer.lstrip(_SPACE)
        place = self._buffer.find(opening)
        if place < 0:
            kept = _open_end(self._buffer, opening)
            shown = len(self._buffer) - kept
            read.content += self._buffer[:shown]
            self._buffer = self._buffer[shown:]
            return False
        read.content += self._buffer[:place]
        self._buffer = self._buffer[place + len(opening) :]
        self._in_calls, self._is_announced = True, False
        return True

    def _begin_llama(self, read: Read) -> bool:
        text = self._buffer.removeprefix("<|python_tag|>") if not self._began else self._buffer
        if not self._began and "<|python_tag|>".startswith(self._buffer):
            return False
        stripped = text.lstrip(_SPACE)
        if not self._began and not stripped:
            return False
        if not self._began and stripped.startswith("{"):
            self._began = self._in_calls = True
            self._buffer = stripped
            return True
        self._began = True
        read.content += self._buffer
        self._buffer = ""
        return False

    def _between(self, read: Read) -> bool:
        """Around calls: skip what separates them, and find where the next one begins."""
        self._buffer = self._buffer.lstrip(_SEPARATORS[self._format])
        if not self._buffer:
            return False
        if self._buffer.startswith("{"):
            self._call, self._is_announced = _CallObject(), False
            return True
        if self._format == "hermes":
            return self._after_hermes_call(read)
        if self._format == "mistral":
            return self._begin_named_call()
        read.content += self._buffer
        self._buffer = ""
        return False

    def _after_hermes_call(self, read: Read) -> bool:
        for marker in MARKERS["hermes"]:
            if self._buffer.startswith(marker):
                self._buffer = self._buffer[len(marker) :]
                self._in_calls = marker == "<tool_call>"
                self._is_announced = not self._in_calls
                return True
            if marker.startswith(self._buffer):
                return False
        # Neither an object nor an end: it was no call, or the end was forgotten.
        self._in_calls = False
        if not self._is_announced:
            read.content += "<tool_call>"
        return True

    def _begin_named_call(self) -> bool:
        if self._buffer.startswith("]"):
            self._buffer = self._buffer[1:]
            return True
        brace = self._buffer.find("{")
        if brace < 0:
            return False
        name = self._buffer[:brace].rpartition("TOOL_CALLS]")[2].replace("[ARGS]", "").strip()
        self._buffer = self._buffer[brace:]
        self._call, self._is_announced = _CallObject(name=name), False
        return True

    def _in_call(self, call: _CallObject, read: Read) -> bool:
        for place, character in enumerate(self._buffer):
            call.take(character)
            if call.is_closed:
                self._buffer = self._buffer[place + 1 :]
                self._report(call, read)
                self._close(call, read)
                return True
        self._buffer = ""
        self._report(call, read)
        return False

    def _report(self, call: _CallObject, read: Read) -> None:
        if not self._is_announced:
            is_ready = call.name is not None and (call.has_arguments or call.is_closed)
            if not is_ready or (self._format == "llama3" and call.name not in self._names):
                return
            self._is_announced = True
            self.num_calls += 1
            read.calls.append(CallPart(self.num_calls - 1, id=self._new_id(), name=call.name))
        if arguments := call.fresh():
            read.calls.append(CallPart(self.num_calls - 1, arguments=arguments))

    def _close(self, call: _CallObject, read: Read) -> None:
        if not self._is_announced:
            read.content += self._as_text(call)
            self._in_calls = self._format == "mistral"
        elif not call.has_arguments:
            read.calls.append(CallPart(self.num_calls - 1, arguments="{}"))
        self._call = None

    def _new_id(self) -> str:
        # Mistral's templates refuse ids of another length when they are sent back.
        return uuid.uuid4().hex[:9] if self._format == "mistral" else f"call_{uuid.uuid4().hex[:24]}"

    def _as_text(self, call: _CallObject) -> str:
        return (_OPENINGS["hermes"] if self._format == "hermes" else "") + call.raw


def _open_end(text: str, marker: str) -> int:
    """How many characters at the end of a text may be the beginning of a marker."""
    longest = min(len(marker) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if marker.startswith(text[-length:])), 0)


def joined(parts: Iterable[CallPart]) -> list[CallPart]:
    """Whole calls from their pieces."""
    calls: dict[int, CallPart] = {}
    for part in parts:
        call = calls.setdefault(part.index, CallPart(part.index))
        call.id, call.name = call.id or part.id, call.name or part.name
        call.arguments += part.arguments
    return list(calls.values())
