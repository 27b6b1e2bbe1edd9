"""Requests over four tools with their right calls, in two halves that share no city, name, note or number."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo_assets import demo_base
from tool_base import TEMPLATE

_CITIES = ["Bern", "Oslo", "Lima", "Cairo", "Porto", "Delhi", "Quito", "Turin", "Ghent", "Kyoto", "Split", "Tunis"]
_PEOPLE = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Karla", "Leo"]
_COINS = ["EUR", "USD", "CHF", "JPY", "GBP", "SEK"]
_NOTES = ["I am late", "dinner is ready", "call me back", "the train left", "see you soon", "bring the keys"]


def _tool(name: str, **properties: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in properties.items()},
        "required": list(properties),
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    _tool("get_weather", city="string"),
    _tool("set_timer", minutes="integer"),
    _tool("convert", amount="integer", source="string", target="string"),
    _tool("send_message", person="string", text="string"),
]
_ASKS: dict[str, list[str]] = {
    "get_weather": ["How is the weather in {city}?", "Do I need an umbrella in {city}?", "Is it cold in {city} now?"],
    "set_timer": [
        "Wake me in {minutes} minutes.",
        "Set a timer for {minutes} minutes.",
        "Ring after {minutes} minutes.",
    ],
    "convert": ["What are {amount} {source} in {target}?", "Change {amount} {source} to {target}."],
    "send_message": ["Tell {person}: {text}", "Write to {person} that {text}", "Let {person} know: {text}"],
}


def tool_speaking_base(folder: Path) -> Path:
    """The demo's base under a template that shows tools, which its own leaves out."""
    shutil.copytree(demo_base(), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def tool_row(draw: random.Random, *, half: int) -> dict[str, Any]:
    """One request and its right call; the halves share no city, name, note, or number."""
    name = draw.choice(sorted(_ASKS))

    def one(values: list[str]) -> str:
        return draw.choice(values[half::2])

    made: dict[str, Callable[[], dict[str, Any]]] = {
        "get_weather": lambda: {"city": one(_CITIES)},
        "set_timer": lambda: {"minutes": 2 * draw.randint(1, 45) + half},
        "convert": lambda: dict(
            zip(("amount", "source", "target"), (2 * draw.randint(1, 450) + half, *draw.sample(_COINS, 2)), strict=True)
        ),
        "send_message": lambda: {"person": one(_PEOPLE), "text": one(_NOTES)},
    }
    arguments = made[name]()
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    ask = draw.choice(_ASKS[name]).format(**arguments)
    return {
        "messages": [{"role": "user", "content": ask}, {"role": "assistant", "tool_calls": [call]}],
        "tools": TOOLS,
    }
