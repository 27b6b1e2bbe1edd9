"""`loractl bench serve`: measure any OpenAI-compatible server as its clients see it. Loads no model."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import click

from loractl.adapters.errors import LoractlError, NotFound
from loractl.cli.load import Load, run_load, summarize
from loractl.cli.output import print_note
from loractl.cli.server_access import get_json, server_option


def _exponent(context: click.Context, option: click.Parameter, value: str) -> float | None:
    """`uniform` is None, `zipf:EXPONENT` its exponent."""
    kind, _, exponent = value.partition(":")
    if value == "uniform":
        return None
    try:
        number = float(exponent or 1.0) if kind == "zipf" else 0.0
    except ValueError:
        number = 0.0
    if not number > 0:
        message = f"{value!r} is neither `uniform` nor `zipf:EXPONENT`, for example zipf:1.0"
        raise click.BadParameter(message, ctx=context, param=option)
    return number


@click.command(short_help="Measure an OpenAI-compatible server.")
@server_option
@click.option("--key", envvar="LORACTL_API_KEY", help="An API key of the server.")
@click.option("--model", "models", multiple=True, help="Repeatable; all of /v1/models if not given.")
@click.option("--popularity", "zipf", callback=_exponent, default="uniform", help="uniform or zipf:1.0.")
@click.option("--in-turn", is_flag=True, help="Models one after the other instead of by chance.")
@click.option("--requests", "num_requests", type=click.IntRange(1), default=64, show_default=True)
@click.option("--concurrency", type=click.IntRange(1), default=8, show_default=True, help="Clients, each in turn.")
@click.option("--rate", "rate_per_s", type=click.FloatRange(0, min_open=True), help="Random arrivals a second.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens a prompt.")
@click.option("--output-tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens an answer.")
@click.option("--eos/--ignore-eos", "heed_eos", help="Let the model end its answers (ignore_eos is an extension).")
@click.option("--warmup", type=click.IntRange(0), default=0, show_default=True, help="Requests beforehand.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of prompts, models and arrivals.")
def serve(*, url: str, key: str | None, models: tuple[str, ...], heed_eos: bool, warmup: int, **options: Any) -> None:
    """Send streamed completions of random tokens and print one line of JSON.

    Times are what a client sees: to the first token (ttft), between chunks (itl), per later token (tpot), whole (e2e),
    in milliseconds. Failed requests are counted by cause and kept out of the times.

    \b
    Examples:
      loractl bench serve --model team/reviews --requests 200 --concurrency 16
      loractl bench serve --popularity zipf:1.0 --rate 20 | jq .ttft_ms.p99
    """
    load = Load(models=models or _models(url, key), ignore_eos=not heed_eos, **options)
    if warmup:
        asyncio.run(run_load(url, key, replace(load, num_requests=warmup, seed=load.seed + 1000)))
    seen, seconds = asyncio.run(run_load(url, key, load))
    figures = summarize(seen, seconds)
    popularity = "uniform" if load.zipf is None else f"zipf:{load.zipf}"
    popularity = "in turn" if load.in_turn else popularity
    setup = {"server": url, "models": len(load.models), "popularity": popularity}
    sizes = {"prompt_tokens": load.prompt_tokens, "max_output_tokens": load.output_tokens}
    arrivals = {"rate_per_s": load.rate_per_s} if load.rate_per_s else {"concurrency": load.concurrency}
    click.echo(json.dumps(setup | sizes | arrivals | figures))
    if all(each.failure is not None for each in seen):
        raise LoractlError(f"no request was answered: {figures['failures']}", hint="see the server's log")
    if figures["failures"]:
        print_note(f"failed: {figures['failures']}")


def _models(url: str, key: str | None) -> list[str]:
    """The adapters that this key may use, or the base where there is none."""
    found = get_json(url, "/v1/models", key)["data"]
    models = [each["id"] for each in found if each.get("parent")] or [each["id"] for each in found]
    if not models:
        raise NotFound(f"{url} lists no model", hint="give --model")
    return models
