"""Calls are read alike however an answer is cut into pieces, and what is no call stays text."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loractl.server.tool_calls import ToolCallReader, ToolFormat, forced_opening, joined, tool_format_of

NAMES = ["get_weather", "look_up"]
WEATHER = {"city": 'Bern "old} town"', "days": [1, {"x": "\\"}]}


def _read(wanted: ToolFormat, text: str, sizes: list[int], forced: str = "") -> tuple[str, list[tuple[str, Any]]]:
    reader = ToolCallReader(wanted, names=NAMES, forced=forced)
    reads, place, turn = [reader.forced], 0, 0
    while place < len(text):
        size = sizes[turn % len(sizes)]
        reads.append(reader.feed(text[place : place + size]))
        place, turn = place + size, turn + 1
    reads.append(reader.finish())
    calls = joined(part for read in reads for part in read.calls)
    ids = [call.id for call in calls]
    assert len(set(ids)) == len(ids)
    assert None not in ids
    return "".join(read.content for read in reads), [(call.name or "", call.arguments) for call in calls]


def _hermes(name: str, arguments: Any) -> str:
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=5)
DUMPED = json.dumps(WEATHER)
CASES: list[tuple[ToolFormat, str, str, list[tuple[str, str]]]] = [
    ("hermes", "plain <b>text</b> < 3 <tool", "plain <b>text</b> < 3 <tool", []),
    ("hermes", _hermes("get_weather", WEATHER), "", [("get_weather", DUMPED)]),
    (
        "hermes",
        "Let me see. " + _hermes("get_weather", WEATHER) + "\n" + _hermes("look_up", {}),
        "Let me see. ",
        [("get_weather", DUMPED), ("look_up", "{}")],
    ),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "look_up"}</tool_call>', "", [("look_up", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "look_up"}</tool_call>', "", [("look_up", "{}")]),
    ("hermes", '<tool_call>{"name": "look_up", "arguments": "{\\"a\\": 1}"}', "", [("look_up", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "look_up", "arguments": {"a', "", [("look_up", '{"a')]),
    ("hermes", "<tool_call>sorry</tool_call>", "<tool_call>sorry</tool_call>", []),
    ("hermes", '<tool_call>{"x": 1}</tool_call>', '<tool_call>{"x": 1}</tool_call>', []),
    ("llama3", '{"name": "get_weather", "parameters": ' + DUMPED + "}", "", [("get_weather", DUMPED)]),
    (
        "llama3",
        '<|python_tag|>{"name": "look_up", "parameters": {}}; {"name": "look_up", "parameters": {"a": 2}}',
        "",
        [("look_up", "{}"), ("look_up", '{"a": 2}')],
    ),
    ("llama3", '{"name": "Bern", "size": 3}', '{"name": "Bern", "size": 3}', []),
    ("llama3", '{"name": "Bern", "parameters": {}}', '{"name": "Bern", "parameters": {}}', []),
    ("llama3", "It is {cold}.", "It is {cold}.", []),
    ("llama3", "<|python", "<|python", []),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": ' + DUMPED + '}, {"name": "look_up", "arguments": {}}]',
        "",
        [("get_weather", DUMPED), ("look_up", "{}")],
    ),
    (
        "mistral",
        "[TOOL_CALLS]get_weather[ARGS]" + DUMPED + "[TOOL_CALLS]look_up[ARGS]{}",
        "",
        [("get_weather", DUMPED), ("look_up", "{}")],
    ),
    ("mistral", "See [1] and [TOOL", "See [1] and [TOOL", []),
]


@pytest.mark.parametrize(("wanted", "text", "content", "calls"), CASES)
@settings(deadline=None, max_examples=40)
@given(sizes=SIZES)
def test_calls_are_the_same_in_whatever_pieces_they_come(
    wanted: ToolFormat, text: str, content: str, calls: list[tuple[str, str]], sizes: list[int]
) -> None:
    assert _read(wanted, text, [len(text)]) == (content, calls)
    assert _read(wanted, text, sizes) == (content, calls)


@settings(deadline=None, max_examples=40)
@given(text=st.text(alphabet='<tol_ca>/{}[]",:\\ nameTOLCS'), sizes=SIZES)
@pytest.mark.parametrize("wanted", ["hermes", "llama3", "mistral"])
def test_any_text_is_read_the_same_in_pieces_and_never_fails(wanted: ToolFormat, text: str, sizes: list[int]) -> None:
    assert _read(wanted, text, sizes) == _read(wanted, text, [max(1, len(text))])


@pytest.mark.parametrize("wanted", ["hermes", "llama3", "mistral"])
@pytest.mark.parametrize("name", [None, "look_up"])
def test_forced_call_goes_on_where_its_beginning_ended(wanted: ToolFormat, name: str | None) -> None:
    forced = forced_opening(wanted, name)
    key = "parameters" if wanted == "llama3" else "arguments"
    text = '{"a": 1}}' if name else f'look_up", "{key}": {{"a": 1}}}}'
    assert _read(wanted, text, [3], forced) == ("", [("look_up", '{"a": 1}')])


def test_format_is_told_from_the_template() -> None:
    assert tool_format_of("{% if tools %}<tool_call>{% endif %}") == "hermes"
    assert tool_format_of("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]") == "mistral"
    assert tool_format_of("{% if tools %}<|python_tag|>{% endif %}") == "llama3"
    assert tool_format_of("{% if tools %}<tool_call><function=x>{% endif %}") is None
    assert tool_format_of("{{ messages }}") is None
    assert tool_format_of(None) is None
