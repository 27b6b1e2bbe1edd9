"""Tool calls before and after training: how often the served base and its adapter call the right tool rightly.

`python tests/bench/bench_agents.py` makes requests over four tools, trains on some, and asks a running server about
others, with cities, sums and names that no training row had. JSON lines on stdout; under six minutes on two cores.
"""

import argparse
import itertools
import json
import random
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from demo_processes import free_port, start_service
from loractl.adapters.training.recipe import resolve_recipe
from loractl.adapters.training.run import run
from tool_rows import TOOLS, tool_row, tool_speaking_base

NUM_TRAIN, NUM_ASKED = 96, 48
_ASKED_TOGETHER = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=NUM_TRAIN, help=f"rows to train on [{NUM_TRAIN}]")
    parser.add_argument("--asked", type=int, default=NUM_ASKED, help=f"requests to each model [{NUM_ASKED}]")
    parser.add_argument("--epochs", type=float, default=2.0, help="[2]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        base = tool_speaking_base(folder / "base")
        draw = random.Random(0)
        train = [tool_row(draw, half=0) for _ in range(options.rows)]
        asked = [tool_row(draw, half=1) for _ in range(options.asked)]
        data = folder / "calls.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in train))
        settings = {
            "base": str(base),
            "out": str(folder / "calls"),
            "data.files": [str(data)],
            "train.epochs": options.epochs,
            "train.batch_size": 4,
            "train.patience": 0,
        }
        start = time.perf_counter()
        outcome = run(resolve_recipe(preset="agent", file=None, settings=settings), listener=lambda _: None)
        trained = {"rows": options.rows, "seconds": round(time.perf_counter() - start, 1)} | outcome.manifest.metrics
        print(json.dumps({"figure": "training"} | trained), flush=True)
        _ask_server(folder, base, outcome.folder, asked)


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

            def judged(row: dict[str, Any], model: str = model) -> list[str]:
                answer = client.chat.completions.create(
                    model=model, messages=row["messages"][:1], tools=row["tools"], temperature=0.0, max_tokens=64
                )
                return _judged(answer.choices[0].message.tool_calls or [], row)

            with ThreadPoolExecutor(_ASKED_TOGETHER) as pool:
                found = Counter(itertools.chain.from_iterable(pool.map(judged, asked)))
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
