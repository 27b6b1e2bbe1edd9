"""Tool calls before and after training: how often the served base and its adapter call the right tool rightly.

`python tests/bench/bench_agents.py` makes requests over four tools, trains on some, and asks a running server about
others, with cities, sums and names that no training row had. JSON lines on stdout; under six minutes on two cores.
"""

import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo_assets import demo_base
from demo_processes import free_port, start_service
from loractl.adapters.training.recipe import resolve_recipe
from loractl.adapters.training.run import run
from tool_base import TEMPLATE

NUM_TRAIN, NUM_ASKED = 96, 48
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


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        base = _tool_speaking_base(folder / "base")
        draw = random.Random(0)
        train = [_row(draw, half=0) for _ in range(NUM_TRAIN)]
        asked = [_row(draw, half=1) for _ in range(NUM_ASKED)]
        data = folder / "calls.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in train))
        settings = {
            "base": str(base),
            "out": str(folder / "calls"),
            "data.files": [str(data)],
            "train.epochs": 2,
            "train.batch_size": 4,
            "train.patience": 0,
        }
        start = time.perf_counter()
        outcome = run(resolve_recipe(preset="agent", file=None, settings=settings), listener=lambda _: None)
        trained = {"rows": NUM_TRAIN, "seconds": round(time.perf_counter() - start, 1)} | outcome.manifest.metrics
        print(json.dumps({"figure": "training"} | trained), flush=True)
        _ask_server(folder, base, outcome.folder, asked)


def _tool_speaking_base(folder: Path) -> Path:
    """The demo's base under a template that shows tools, which its own leaves out."""
    shutil.copytree(demo_base(), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def _row(draw: random.Random, *, half: int) -> dict[str, Any]:
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


def _ask_server(folder: Path, base: Path, adapter: Path, asked: list[dict[str, Any]]) -> None:
    import openai

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = ("serve", str(base), "--port", str(port), "--adapter", f"calls={adapter}")
    server = start_service("server", *words, url=url, folder=folder, environment={})
    try:
        server.wait_until_ready()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        for model in (base.name, "calls"):
            found = Counter[str]()
            for row in asked:
                answer = client.chat.completions.create(
                    model=model, messages=row["messages"][:1], tools=row["tools"], temperature=0.0, max_tokens=64
                )
                found.update(_judged(answer.choices[0].message.tool_calls or [], row))
            rates = {key: round(found[key] / len(asked), 3) for key in ("right_tool", "valid", "exact")}
            print(json.dumps({"figure": "tool calls", "model": model, "requests": len(asked)} | rates), flush=True)
    finally:
        server.stop()


def _judged(calls: list[Any], row: dict[str, Any]) -> list[str]:
    """What is right of an answer: one call of the right tool, with arguments of its schema, and the right ones."""
    import jsonschema

    wanted = row["messages"][1]["tool_calls"][0]["function"]
    if len(calls) != 1 or calls[0].function.name != wanted["name"]:
        return []
    schema = next(tool for tool in TOOLS if tool["function"]["name"] == wanted["name"])["function"]["parameters"]
    try:
        arguments = json.loads(calls[0].function.arguments)
        jsonschema.validate(arguments, schema)
    except (ValueError, jsonschema.ValidationError):
        return ["right_tool"]
    return ["right_tool", "valid", *(["exact"] if arguments == wanted["arguments"] else [])]


if __name__ == "__main__":
    main()
