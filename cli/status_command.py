"""`loractl status`: a server's residency, queues and speed, once or live. Loads no model."""

import sys
import time
from typing import Any

import click

from loractl.adapters.errors import Unreachable
from loractl.cli.output import print_json, print_note, print_table
from loractl.cli.server_access import get_json, server_option

COLUMNS = ("name", "level", "rank", "pinned", "running", "digest")


@click.command(short_help="Show a server's adapters, queues and speed.")
@server_option
@click.option("--key", envvar="LORACTL_API_KEY", help="An API key with the admin right.")
@click.option("--watch", is_flag=True, help="Go on until interrupted: a live table, or one line each time in a pipe.")
@click.option("--interval", "interval_s", type=click.FloatRange(0.1), default=1.0, show_default=True, help="Seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: one document, or one a line with --watch.")
def status(*, url: str, key: str | None, watch: bool, interval_s: float, as_json: bool) -> None:
    """Show a server's adapters, queues and speed.

    Speed is measured between two looks, `--interval` seconds apart.

    \b
    Examples:
      loractl status
      loractl status --watch
      loractl status --json | jq .adapters
    """
    look = _Looks(url, key)
    if not watch:
        look.next()
        time.sleep(interval_s)
        now = look.next()
        if as_json:
            print_json(now)
            return
        click.echo(headline(now))
        click.echo(queues(now))
        print_table(COLUMNS, rows(now), as_json=False, empty="no adapter is resident")
        return
    if as_json or not _is_terminal():
        _lines(look, interval_s, as_json=as_json)
    else:
        _live(look, interval_s)


class _Looks:
    """Asks again and again, and adds what changed since the last time: tokens and steps a second."""

    def __init__(self, url: str, key: str | None) -> None:
        self._url, self._key = url, key
        self._before: tuple[float, dict[str, Any]] | None = None

    def next(self) -> dict[str, Any]:
        found: dict[str, Any] = get_json(self._url, "/admin/status", self._key)
        now = time.monotonic()
        speed: dict[str, float | None] = dict.fromkeys(("generated", "prompt", "steps"))
        if self._before is not None:
            then, before = self._before
            for name, field in (("generated", "num_generated_tokens"), ("prompt", "num_prompt_tokens")):
                # Counters begin anew with an engine that was built anew.
                speed[name] = round(max(0, found[field] - before[field]) / (now - then), 1)
            speed["steps"] = round(max(0, found["num_steps"] - before["num_steps"]) / (now - then), 1)
        self._before = now, found
        return found | {"per_s": speed}


def headline(status: dict[str, Any]) -> str:
    """Who the server is, how it is, and how fast."""
    state = "draining" if status["draining"] else "ready" if status["ready"] else status["state"]
    hub = {None: "none", True: "up", False: "down"}[status["hub_up"]]
    line = f"{status['base']} ({status['quantization']}): {state}, hub {hub}"
    speed = status["per_s"]
    if speed["generated"] is not None:
        line += f", {speed['generated']:g} tokens/s out, {speed['prompt']:g} in, {speed['steps']:g} steps/s"
    return line


def queues(status: dict[str, Any]) -> str:
    """What runs and waits, and for what."""
    reasons = ", ".join(f"{number} for {reason}" for reason, number in sorted(status["waiting"].items()) if number)
    waiting = sum(status["waiting"].values())
    resident = sum(adapter["level"] == "device" for adapter in status["adapters"])
    return (
        f"running {status['running']}, waiting {waiting}" + (f" ({reasons})" if reasons else "") + ", "
        f"slots {resident}/{status['num_slots']}, KV {status['kv_usage_ratio']:.0%}, "
        f"most adapters in a step {status['max_distinct_adapters_in_step']}"
    )


def rows(status: dict[str, Any]) -> list[dict[str, Any]]:
    """One row an adapter: the busiest first."""
    order = sorted(status["adapters"], key=lambda each: (-each["num_running"], each["level"], each["name"]))
    return [
        adapter
        | {
            "digest": adapter["digest"][:19],
            "running": adapter["num_running"],
            "pinned": "yes" if adapter["pinned"] else None,
        }
        for adapter in order
    ]


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _lines(look: _Looks, interval_s: float, *, as_json: bool) -> None:
    import json

    now: dict[str, Any] | None = look.next()
    while True:
        if now is not None:
            click.echo(json.dumps(now) if as_json else f"{headline(now)}; {queues(now)}")
        time.sleep(interval_s)
        now = _again(look)


def _live(look: _Looks, interval_s: float) -> None:
    from rich.live import Live
    from rich.text import Text

    with Live(_table(look.next()), auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(interval_s)
            try:
                shown = _table(look.next())
            except Unreachable as error:
                # Whoever watches wants to see it come back.
                shown = Text(f"{error.message}; asking again", style="bold red")
            live.update(shown, refresh=True)


def _again(look: _Looks) -> dict[str, Any] | None:
    """The next look; None, and a note, while a server that has been seen does not answer."""
    try:
        return look.next()
    except Unreachable as error:
        print_note(f"{error.message}; asking again")
        return None


def _table(status: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column.upper())
    for row in rows(status):
        table.add_row(*(Text("-" if row.get(column) is None else str(row[column])) for column in COLUMNS))
    return Group(Text(headline(status), style="bold"), Text(queues(status)), Text(""), table)
