"""What a chat request wants of its tools: which are rendered, and whether a call is free, forced or forbidden.

Knows the request and the base's template; refuses to know answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loractl.adapters.errors import BadRequest
from loractl.server.openai_wire import ChatRequest, NamedTool, Tool
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
    opening = ""
    if isinstance(choice, NamedTool):
        opening = forced_opening(wanted, choice.function.name)
    elif choice == "required":
        opening = forced_opening(wanted, names[0] if len(names) == 1 else None)
    if opening and request.continue_final_message:
        raise BadRequest("continue_final_message excludes a forced tool call", field="tool_choice")
    return ToolPlan(
        format=wanted,
        tools=tuple(request.tools),
        opening=opening,
        markers=_special_markers(tokenizer, wanted),
        is_single=request.parallel_tool_calls is False,
    )


def _special_markers(tokenizer: Any, wanted: ToolFormat) -> dict[int, str]:
    found: dict[int, str] = {}
    for marker in MARKERS[wanted]:
        token_id: int | None = tokenizer.convert_tokens_to_ids(marker)
        if token_id is None or token_id == tokenizer.unk_token_id:
            continue
        if not tokenizer.decode([token_id], skip_special_tokens=True):
            found[token_id] = marker
    return found
