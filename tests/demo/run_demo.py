"""The whole product on real input in one terminal: train three adapters, push, serve, ask, replace one live.

Every figure it prints is measured in this run. `--keep` leaves the hub and the server up.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table

from demo_assets import demo_base
from demo_client import (
    Answer,
    burst,
    digest_of,
    label_accuracy,
    label_token_ids,
    long_stream,
    metric,
    verdict_accuracy,
)
from demo_data import DemoData, write_demo_data
from demo_processes import DemoFailure, Service, free_port, heartbeat, run_loractl, start_service

# The preset asks for 3 epochs over everything; two cores get one epoch over a part, so that the demo ends in minutes.
NUM_MOVIES, NUM_PRODUCTS, NUM_VERDICTS = 1800, 500, 250
NUM_HELD_OUT = 500
NUM_HELD_OUT_VERDICTS = 60
BURST_PROMPTS = (
    "What a wonderful evening at the cinema!",
    "The battery died after two days.",
    "I have waited an hour and nobody came.",
    "Best pizza in town, and the staff is kind.",
)


@dataclass(slots=True)
class Trained:
    """One adapter of the demo and what the table says of it."""

    name: str
    folder: Path
    train_s: float
    num_parameters: int
    size_bytes: int
    base_accuracy: float = 0.0
    accuracy: float = 0.0
    digest: str = ""

    @property
    def model(self) -> str:
        return f"demo/{self.name}@prod"


@dataclass(slots=True)
class Demo:
    """Where the demo lives: its folder, its base, its two services, and what it has trained."""

    folder: Path
    base: Path
    console: Console
    environment: dict[str, str]
    data: DemoData
    hub: Service | None = None
    server: Service | None = None
    trained: list[Trained] = field(default_factory=list)

    def loractl(self, *args: str) -> str:
        return run_loractl(*args, console=self.console, environment=self.environment)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the hub and the server up")
    parser.add_argument("--folder", type=Path, default=Path("build/demo"), help="where everything is written")
    options = parser.parse_args()
    console = Console(stderr=False, highlight=False)
    if not console.is_terminal:
        console = Console(stderr=False, highlight=False, width=110)
    try:
        with prepared(options.folder, console, keep=options.keep) as demo:
            start = time.monotonic()
            start_hub(demo)
            train_all(demo)
            start_server(demo)
            asyncio.run(ask_everything(demo))
            report(demo, total_s=time.monotonic() - start)
    except DemoFailure as failure:
        console.print(f"[red]demo failed[/red]: {failure}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


@contextlib.contextmanager
def prepared(folder: Path, console: Console, *, keep: bool) -> Iterator[Demo]:
    """Fetch base and data, give the demo an empty folder, and end its services afterwards."""
    heading(console, "The base model and the text")
    with heartbeat(console, "fetching the base model and the sentences (once)"):
        base = demo_base()
        shutil.rmtree(folder, ignore_errors=True)
        data = write_demo_data(
            folder / "data",
            num_movies=NUM_MOVIES,
            num_products=NUM_PRODUCTS,
            num_verdicts=NUM_VERDICTS,
            num_held_out=NUM_HELD_OUT,
        )
    console.print(f"base   {base.name} (135 M parameters)")
    console.print(
        f"text   {NUM_MOVIES} movie, {NUM_PRODUCTS} product and {NUM_VERDICTS} tweet rows to train on; "
        f"{NUM_HELD_OUT} of each held out"
    )
    environment = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "LORACTL_CACHE": str(folder.resolve() / "cache")}
    demo = Demo(folder.resolve(), base, console, environment, data)
    try:
        yield demo
    except BaseException:
        keep = False
        raise
    finally:
        for service in (demo.server, demo.hub):
            if service is not None and not keep:
                service.stop()


def heading(console: Console, text: str) -> None:
    console.print(f"\n[bold]== {text}[/bold]")


def start_hub(demo: Demo) -> None:
    heading(demo.console, "The hub: SQLite and a folder, with a token of its own")
    root, port = demo.folder / "hub", free_port()
    created = demo.loractl(
        "hub", "token", "create", "--root", str(root), "--name", "demo", "--scope", "admin", "--json"
    )
    demo.environment["LORACTL_TOKEN"] = json.loads(created)["token"]
    url = f"http://127.0.0.1:{port}"
    demo.environment["LORACTL_HUB"] = url
    demo.hub = start_service(
        "hub",
        *("hub", "serve", "--root", str(root), "--port", str(port)),
        url=url,
        folder=demo.folder,
        environment=demo.environment,
    )
    demo.hub.wait_until_ready()
    demo.console.print(f"hub    {url}")


def train_all(demo: Demo) -> None:
    heading(demo.console, "Training on the 8-bit base: one epoch on a part of the preset's data")
    review = ("--preset", "article", "--set", "train.epochs=1")
    train(demo, "movies", demo.data.movies, *review)
    train(demo, "products", demo.data.products, *review)
    train(demo, "verdicts", demo.data.verdicts, "--preset", "quick", "--set", "train.epochs=1")
    for trained in demo.trained:
        push(demo, trained)


def train(demo: Demo, name: str, data: Path, *options: str, folder: str | None = None) -> Trained:
    """Train one adapter through the command, and read its facts from the manifest that it wrote."""
    out = demo.folder / "adapters" / (folder or name)
    demo.loractl(
        *("train", "--base", str(demo.base), "--data", str(data), "--out", str(out), "--quantize", "int8"), *options
    )
    manifest = json.loads((out / "loractl.json").read_text())
    trained = Trained(
        name=name,
        folder=out,
        train_s=manifest["metrics"]["train_seconds"],
        num_parameters=manifest["num_trainable_parameters"],
        size_bytes=(out / "adapter_model.safetensors").stat().st_size,
    )
    demo.trained = [other for other in demo.trained if other.name != name] + [trained]
    return trained


def push(demo: Demo, trained: Trained) -> None:
    demo.loractl("push", str(trained.folder), f"demo/{trained.name}", "--channel", "prod")


def start_server(demo: Demo) -> None:
    heading(demo.console, "The server: one 8-bit base, adapters by name")
    url = f"http://127.0.0.1:{(port := free_port())}"
    demo.environment["LORACTL_SERVER"] = url
    demo.server = start_service(
        "server",
        *("serve", str(demo.base), "--hub", demo.environment["LORACTL_HUB"], "--port", str(port)),
        *("--quantize", "int8", "--slots", "4"),
        url=url,
        folder=demo.folder,
        environment=demo.environment,
    )
    with heartbeat(demo.console, "loading the base in 8 bits"):
        demo.server.wait_until_ready()
    demo.console.print(f"server {url}")


async def ask_everything(demo: Demo) -> None:
    client = AsyncOpenAI(base_url=f"{server_url(demo)}/v1", api_key="unused", max_retries=0, timeout=300.0)
    async with client:
        await show_burst(demo, client)
        await measure(demo, client)
        await replace_while_serving(demo, client)


def server_url(demo: Demo) -> str:
    if demo.server is None:
        raise DemoFailure("the server was not started")
    return demo.server.url


async def show_burst(demo: Demo, client: AsyncOpenAI) -> None:
    models = [demo.base.name, *(trained.model for trained in demo.trained)]
    heading(demo.console, f"One burst: {len(BURST_PROMPTS)} prompts x {len(models)} models, all at once")
    answers = await burst(client, models, BURST_PROMPTS)
    for prompt in BURST_PROMPTS[:2]:
        demo.console.print(_answers_table(prompt, [answer for answer in answers if answer.prompt == prompt]))
    most = metric(server_url(demo), "loractl_server_batch_distinct_adapters_max")
    demo.console.print(f"largest number of distinct adapters in one step: {most:.0f} (from /metrics)")
    if most < len(demo.trained):
        raise DemoFailure("the burst was not batched over all adapters")


def _answers_table(prompt: str, answers: list[Answer]) -> Table:
    table = Table(title=prompt, title_justify="left", box=None, show_header=False)
    for answer in answers:
        table.add_row(answer.model, answer.text.replace("\n", " ")[:90], answer.digest[:15])
    return table


async def measure(demo: Demo, client: AsyncOpenAI) -> None:
    heading(demo.console, f"Held-out accuracy through the server, {NUM_HELD_OUT} sentences each")
    labels = await label_token_ids(client, demo.base.name)
    rows = {"movies": demo.data.held_out_movies, "products": demo.data.held_out_products}
    with heartbeat(demo.console, "asking"):
        for trained in demo.trained:
            if trained.name in rows:
                held_out = rows[trained.name]
                trained.base_accuracy = await label_accuracy(client, demo.base.name, held_out, labels)
                trained.accuracy = await label_accuracy(client, trained.model, held_out, labels)
            else:
                tweets = demo.data.held_out_tweets[:NUM_HELD_OUT_VERDICTS]
                trained.base_accuracy = await verdict_accuracy(client, demo.base.name, tweets)
                trained.accuracy = await verdict_accuracy(client, trained.model, tweets)
    for trained in demo.trained:
        demo.console.print(f"{trained.model:<20} base {trained.base_accuracy:.1%}, adapter {trained.accuracy:.1%}")


async def replace_while_serving(demo: Demo, client: AsyncOpenAI) -> None:
    """Train movies on more rows, push v2, promote it, and show old and new answering side by side."""
    heading(demo.console, "A second version, promoted while a request is in flight")
    first = next(trained for trained in demo.trained if trained.name == "movies")
    first.digest = await digest_of(client, first.model)
    out = demo.folder / "adapters" / "movies-v2"
    await asyncio.to_thread(
        demo.loractl,
        *("train", "--base", str(demo.base), "--data", str(demo.data.movies_more), "--out", str(out)),
        *("--preset", "article", "--quantize", "int8", "--set", "train.epochs=1", "--from", str(first.folder)),
    )
    await asyncio.to_thread(demo.loractl, "push", str(out), "demo/movies", "--channel", "staging")
    started = asyncio.Event()
    in_flight = asyncio.create_task(long_stream(client, first.model, num_tokens=200, started=started))
    await started.wait()
    await asyncio.to_thread(demo.loractl, "promote", "demo/movies@v2", "prod")
    moved_at = time.monotonic()
    while (digest := await digest_of(client, first.model)) == first.digest:
        if time.monotonic() - moved_at > 10:
            raise DemoFailure("the server did not follow the promotion")
        await asyncio.sleep(0.1)
    took_s = time.monotonic() - moved_at
    overlapped = not in_flight.done()
    stream = await in_flight
    if stream.digest != first.digest or stream.finish_reason != "length":
        raise DemoFailure("the request in flight did not finish on v1")
    demo.console.print(
        f"in flight   {stream.digest[:19]} (v1): {stream.num_pieces} pieces, finished by {stream.finish_reason}"
    )
    demo.console.print(f"new request {digest[:19]} (v2): {took_s:.1f} s after the promotion, without a restart")
    demo.console.print(f"v2 answered while v1 was still streaming: {'yes' if overlapped else 'no'}")


def report(demo: Demo, *, total_s: float) -> None:
    heading(demo.console, "What was measured")
    table = Table()
    for column in ("adapter", "trainable", "on disk", "training", "base accuracy", "adapter accuracy"):
        table.add_column(column, justify="left" if column == "adapter" else "right")
    for trained in demo.trained:
        table.add_row(
            f"demo/{trained.name}",
            f"{trained.num_parameters:,}",
            f"{trained.size_bytes / 1e6:.2f} MB",
            f"{trained.train_s:.0f} s",
            f"{trained.base_accuracy:.1%}",
            f"{trained.accuracy:.1%}",
        )
    demo.console.print(table)
    demo.console.print(_memory_line(demo.base))
    demo.console.print(f"training, pushing and serving took {total_s:.0f} s on {os.cpu_count()} cores")
    url = server_url(demo)
    demo.console.print(f"metrics  {url}/metrics")
    body = json.dumps({"model": "demo/verdicts@prod", "messages": [{"role": "user", "content": "I love it"}]})
    demo.console.print(
        f"try      curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'", soft_wrap=True
    )
    movies = next(trained for trained in demo.trained if trained.name == "movies")
    if movies.accuracy - movies.base_accuracy < 0.10:
        raise DemoFailure("demo/movies does not beat the base by 10 points")


def _memory_line(base: Path) -> str:
    from loractl.adapters.base_loading import load_base_model, memory_bytes

    in_bf16 = sum(memory_bytes(load_base_model(base, quantization="none", dtype="bfloat16")).values())
    in_int8 = sum(memory_bytes(load_base_model(base, quantization="int8", dtype="bfloat16")).values())
    return f"base in memory: {in_bf16 / 1e6:.0f} MB in bf16, {in_int8 / 1e6:.0f} MB in int8"


if __name__ == "__main__":
    sys.exit(main())
