"""Checks conversations and brings them into the one shape that chat templates take. Knows no files and no tokens.

OpenAI's messages with tools and tool calls, and ShareGPT's turns. Tools and calls come out as the server renders them.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
_OTHER_NAMES = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
}


class BadConversation(Exception):
    """What is wrong with a conversation and at which key; whoever knows its place adds it."""

    def __init__(self, message: str, *, key: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message, self.key, self.hint = message, key, hint


def checked_messages(messages: Any, *, key: str = "messages", needs_answer: bool = True) -> list[dict[str, Any]]:
    """Return OpenAI's messages as a template takes them; raises BadConversation naming the message."""
    if not isinstance(messages, list) or not messages:
        raise BadConversation(f"{key} is not a list of messages", key=key)
    turns = [_turn(f"{key}[{number}]", message) for number, message in enumerate(messages)]
    if needs_answer and not any(turn["role"] == "assistant" and turn.get("weight") != 0 for turn in turns):
        raise BadConversation("no assistant message, so nothing to learn", key=key)
    return turns


def messages_of_turns(turns: Any) -> list[dict[str, Any]]:
    """Return ShareGPT's `from` and `value` as messages; raises BadConversation naming the turn."""
    if not isinstance(turns, list) or not turns:
        raise BadConversation("conversations is not a list of turns", key="conversations")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("from"), str) or "value" not in turn:
            raise BadConversation(f"conversations[{number}] lacks `from` or `value`", key="conversations")
        messages.append({"role": turn["from"], "content": turn["value"]})
    return checked_messages(messages)


def checked_tools(tools: Any, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return tools as the server renders them; they may be JSON text. Raises BadConversation."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadConversation("tools is text but not JSON", key="tools") from error
    if not isinstance(tools, list):
        raise BadConversation(f"tools is {type(tools).__name__}, not a list", key="tools")
    specs = [_tool(number, tool) for number, tool in enumerate(tools)]
    names = [spec["function"]["name"] for spec in specs]
    for number, message in enumerate(messages):
        for call in message.get("tool_calls", ()):
            name = call["function"]["name"]
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean `{close[0]}`?" if close else f"tools: {', '.join(names)}"
                raise BadConversation(
                    f"messages[{number}] calls {name!r}, which tools lacks", key="messages", hint=hint
                )
    return specs


def _turn(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadConversation(f"{where} is {type(message).__name__}, not an object", key="messages")
    role = str(message.get("role"))
    role = _OTHER_NAMES.get(role, role)
    if role not in ROLES:
        close = difflib.get_close_matches(role, ROLES, n=1)
        raise BadConversation(
            f"{where}.role is {message.get('role')!r}",
            key="role",
            hint=f"did you mean `{close[0]}`?" if close else f"roles: {', '.join(ROLES)}",
        )
    turn: dict[str, Any] = {"role": role}
    calls = message.get("tool_calls") or _old_style_call(message)
    turn["content"] = _content(where, message.get("content"), may_lack=bool(calls))
    for key in ("name", "tool_call_id", "weight", "reasoning_content"):
        if message.get(key) is not None:
            turn[key] = message[key]
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise BadConversation(f"{where}.tool_calls is not an assistant's list of calls", key="tool_calls")
        turn["tool_calls"] = [_call(f"{where}.tool_calls[{number}]", call) for number, call in enumerate(calls)]
    return turn


def _old_style_call(message: Mapping[str, Any]) -> list[Any]:
    """`function_call` is what `tool_calls` was before there could be several."""
    return [{"function": message["function_call"]}] if message.get("function_call") else []


def _content(where: str, content: Any, *, may_lack: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and may_lack:
        return ""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    raise BadConversation(f"{where}.content is {type(content).__name__}, not text", key="content")


def _call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadConversation(f"{where} has no function.name", key="tool_calls")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise BadConversation(f"{where}.function.arguments is not JSON: {error}", key="arguments") from error
    else:
        arguments = _without_nulls(arguments)
    if not isinstance(arguments, dict):
        raise BadConversation(f"{where}.function.arguments is {type(arguments).__name__}", key="arguments")
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return named | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tool(number: int, tool: Any) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadConversation(f"tools[{number}] has no function.name", key="tools")
    spec: dict[str, Any] = {"name": function["name"]}
    if function.get("description") is not None:
        spec["description"] = function["description"]
    spec["parameters"] = _without_nulls(function.get("parameters")) or {"type": "object", "properties": {}}
    return {"type": "function", "function": spec}


def _without_nulls(value: Any) -> Any:
    """Tables fill what a row lacks with nulls, in every row the keys of all; a model would learn to write them."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
