"""`loractl serve`: a thin command over the server. No torch until a base is loaded."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from loractl.adapters.errors import UsageError
from loractl.cli.context import read_secret
from loractl.cli.output import is_interactive, print_json, print_note


@click.command(short_help="Serve a base model and its adapters with an OpenAI-compatible API.")
@click.argument("base")
@click.option("--hub", "hub_url", envvar="LORACTL_HUB", help="Hub that adapters are fetched from by name.")
@click.option("--token", envvar="LORACTL_TOKEN", help="The server's own token for the hub.", show_envvar=True)
@click.option("--token-file", type=click.Path(path_type=Path), help="File with that token, instead of --token.")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=DIR", help="Serve a local adapter; repeatable.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8800, show_default=True, help="Port to listen on; 0 lets the system choose.")
@click.option("--name", "base_name", help="Model name of the bare base; its folder's or repo's name if not given.")
@click.option(
    "--quantize", type=click.Choice(["int8", "nf4", "none"]), default="int8", show_default=True, help="Weights' format."
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="What is computed in.",
)
@click.option("--slots", type=int, help="Adapters resident on the device at once; by memory if not given.")
@click.option("--max-rank", default=64, show_default=True, help="Highest LoRA rank that a slot holds.")
@click.option("--kv-bytes", type=int, help="Memory of the KV cache; by what is free if not given.")
@click.option("--max-model-len", type=int, help="Longest sequence, prompt and output together.")
@click.option("--max-running", default=64, show_default=True, help="Sequences that decode at once.")
@click.option("--max-queue", default=1024, show_default=True, help="Requests that may wait; the next one gets 429.")
@click.option(
    "--max-step-s",
    type=click.FloatRange(min=1),
    default=30.0,
    show_default=True,
    help="A step that takes longer counts as hung and is interrupted; more for a large base on few processors.",
)
@click.option("--api-keys", "keys_file", type=click.Path(path_type=Path), help="File with one API key a line.")
@click.option("--keys-from-hub", is_flag=True, help="Callers' hub tokens are API keys, for what they may read there.")
@click.option("--adapter-requests", type=click.FloatRange(1), help="Requests a minute of each adapter, over all keys.")
@click.option("--adapter-tokens", type=click.FloatRange(1), help="Tokens a minute of each adapter, over all keys.")
@click.option("--adapter-concurrent", type=click.IntRange(1), help="Requests at a time of each adapter.")
@click.option("--insecure", is_flag=True, help="Listen beyond this machine without keys.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder for fetched adapters.")
@click.option("--cache-bytes", type=int, help="Limit of that folder.")
@click.option("--drain-timeout", default=300.0, show_default=True, help="Seconds that running answers get at the end.")
@click.option("--drain-grace", default=0.0, show_default=True, help="Seconds to keep answering 503 before closing.")
@click.option(
    "--vllm-metrics", is_flag=True, help="Tell the metrics that routers and dashboards read by vLLM's names too."
)
@click.option("--check-config", is_flag=True, help="Check everything but the weights, print it, and stop.")
def serve(**options: Any) -> None:
    """Serve a base model and its adapters with an OpenAI-compatible API.

    BASE is a folder in transformers' format or a hub repo id. The adapter is the request's `model`: a NAME given with
    --adapter, or TEAM/NAME[@REVISION] in the hub.

    \b
    Examples:
      loractl serve ./smollm2 --hub http://127.0.0.1:8700
      loractl serve ./smollm2 --adapter movies=./out/movies --quantize none
    """
    from loractl.server import assemble
    from loractl.server.run import log_to_stderr, open_socket, run_server

    host, port = options["host"], options["port"]
    checked = assemble.check(_choices(options))
    if options["check_config"]:
        print_json(
            {
                "base": checked.base_name,
                "fingerprint": checked.fingerprint,
                "adapters": list(checked.local),
                "vllm_metrics": checked.choices.vllm_metrics,
                "tracing": checked.tracing is not None,
            }
        )
        return
    listener = open_socket(host, port)
    port = listener.getsockname()[1]
    with _progress(f"loading {checked.base_name} ({options['quantize']})"):
        serving = assemble.load(checked)
    log_to_stderr()
    run_server(serving, listener, on_ready=lambda: _say_ready(host, port, checked.base_name))


def _choices(options: dict[str, Any]) -> Any:
    from loractl.server.assemble import Choices
    from loractl.server.engine.settings import EngineSettings

    engine = EngineSettings(
        num_slots=options["slots"],
        max_rank=options["max_rank"],
        kv_bytes=options["kv_bytes"],
        max_model_len=options["max_model_len"],
        max_running=options["max_running"],
        max_queue=options["max_queue"],
    )
    return Choices(
        base=options["base"],
        base_name=options["base_name"],
        hub_url=options["hub_url"],
        hub_token=_hub_token(options["token"], options["token_file"]),
        adapters=_local_adapters(options["adapters"]),
        host=options["host"],
        insecure=options["insecure"],
        keys_file=options["keys_file"],
        keys_from_hub=options["keys_from_hub"],
        adapter_limits=_adapter_limits(options),
        quantization=options["quantize"],
        dtype=options["dtype"],
        engine=engine,
        max_step_s=options["max_step_s"],
        cache_folder=options["cache"],
        cache_bytes=options["cache_bytes"],
        drain_timeout_s=options["drain_timeout"],
        drain_grace_s=options["drain_grace"],
        vllm_metrics=options["vllm_metrics"],
    )


def _hub_token(token: str | None, file: Path | None) -> str | None:
    if file is None:
        return token
    if token is not None:
        raise UsageError("--token (or LORACTL_TOKEN) and --token-file are both given", hint="keep one")
    return read_secret(file)


def _adapter_limits(options: dict[str, Any]) -> Any:
    from loractl.server.access import Key

    given = options["adapter_requests"], options["adapter_tokens"], options["adapter_concurrent"]
    if given == (None, None, None):
        return None
    return Key(requests_per_minute=given[0], tokens_per_minute=given[1], max_concurrent=given[2])


def _local_adapters(given: tuple[str, ...]) -> dict[str, Path]:
    adapters: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise UsageError(f"--adapter {text!r} is not NAME=DIR")
        if name in adapters:
            raise UsageError(f"--adapter {name} is given twice")
        if "," in name or '"' in name or "\n" in name or "\\" in name:
            raise UsageError(f"--adapter {name!r}: a name has no comma, quote, backslash or line break")
        adapters[name] = Path(folder)
    return adapters


def _say_ready(host: str, port: int, base_name: str) -> None:
    url = f"http://{'127.0.0.1' if host in {'0.0.0.0', '::'} else host}:{port}"  # noqa: S104 - compared, not bound
    print_note(f"ready: {url}/v1  (base {base_name}, metrics {url}/metrics)")
    body = f'{{"model": "{base_name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    print_note(f"try:   curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'")


@contextmanager
def _progress(what: str) -> Iterator[None]:
    """Show that something goes on: a spinner for a person, a line every few seconds otherwise."""
    if is_interactive():
        from rich.console import Console

        with Console(stderr=True).status(what):
            yield
        return
    print_note(what)
    started, done = time.monotonic(), threading.Event()

    def beat() -> None:
        while not done.wait(5.0):
            print_note(f"{what}: {time.monotonic() - started:.0f} s")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
