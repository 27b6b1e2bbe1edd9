"""What a chat request wants of its tools: which are rendered, and whether a call is free, forced or forbidden.

Knows the request and the base's template; refuses to know answers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loractl.adapters.errors import BadRequest
from loractl.server.engine.constraint import json_rule
from loractl.server.openai_wire import ChatRequest, FunctionSpec, NamedTool, Tool
from loractl.server.tool_calls import MARKERS, ToolCallReader, ToolFormat, forced_opening, tool_format_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolPlan:
    """The tools of one request, in the format of this base."""

    format: ToolFormat
    tools: tuple[Tool, ...]
    opening: str
    """Text that the answer must begin with; empty where the model decides."""
    markers: Mapping[int, str]
    """Special tokens of the format, which the engine leaves out of its text."""
    is_single: bool
    grammar: str = ""
    """What a forced call must match from `opening` on, in Lark; empty where the model decides."""
    is_strict: bool = False
    """Whether a forced call must be refused where its tool's schema cannot be held to."""

    def reader(self) -> ToolCallReader:
        names = [tool.function.name for tool in self.tools]
        return ToolCallReader(self.format, names=names, forced=self.opening)


def plan_tools(request: ChatRequest, tokenizer: Any) -> ToolPlan | None:
    """Say how tools are used, None where they are not; raises BadRequest for what this base cannot do."""
    choice = request.tool_choice
    if not request.tools:
        if isinstance(choice, NamedTool) or choice in {"auto", "required"}:
            raise BadRequest(
                "tool_choice needs tools", hint="give tools, or leave tool_choice out", field="tool_choice"
            )
        return None
    if choice == "none":
        return None
    wanted = tool_format_of(tokenizer.chat_template)
    if wanted is None:
        raise BadRequest(
            "this base's chat template teaches no tool format that is read here (Hermes, Llama 3 JSON, Mistral)",
            hint='leave tools out, set tool_choice to "none", or serve a base that was trained for tools',
            field="tools",
        )
    names = [tool.function.name for tool in request.tools]
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise BadRequest(
            f"tool_choice names {choice.function.name!r}, which is not among the tools", field="tool_choice"
        )
    chosen: list[FunctionSpec] = []
    if choice == "required":
        chosen = [tool.function for tool in request.tools]
    elif isinstance(choice, NamedTool):
        chosen = [next(tool.function for tool in request.tools if tool.function.name == choice.function.name)]
    opening = forced_opening(wanted, chosen[0].name if len(chosen) == 1 else None) if chosen else ""
    if opening and request.continue_final_message:
        raise BadRequest("continue_final_message excludes a forced tool call", field="tool_choice")
    return ToolPlan(
        format=wanted,
        tools=tuple(request.tools),
        opening=opening,
        markers=_special_markers(tokenizer, wanted),
        is_single=request.parallel_tool_calls is False,
        grammar=_call_grammar(wanted, chosen) if chosen else "",
        is_strict=any(function.strict for function in chosen),
    )


def _call_grammar(wanted: ToolFormat, chosen: Sequence[FunctionSpec]) -> str:
    """The rest of one call: which of several tools, its arguments by their schema, and what closes the call."""
    closing = json.dumps("}]" if wanted == "mistral" else "}")
    rules = []
    for place, function in enumerate(chosen):
        name = "" if len(chosen) == 1 else json.dumps(forced_opening(wanted, function.name, is_begun=True))
        arguments = json_rule(function.parameters or {"type": "object"})
        rules.append(f"call_{place}: {name} {arguments} {closing}")
    start = " | ".join(f"call_{place}" for place in range(len(chosen)))
    return "\n".join([f"start: {start}", *rules])


def _special_markers(tokenizer: Any, wanted: ToolFormat) -> dict[int, str]:
    found: dict[int, str] = {}
    for marker in MARKERS[wanted]:
        token_id: int | None = tokenizer.convert_tokens_to_ids(marker)
        if token_id is None or token_id == tokenizer.unk_token_id:
            continue
        if not tokenizer.decode([token_id], skip_special_tokens=True):
            found[token_id] = marker
    return found
