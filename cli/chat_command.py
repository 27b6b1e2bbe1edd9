"""`loractl chat`: a conversation in the terminal, with one adapter or with two side by side. Loads no model."""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import click

from loractl.adapters.errors import LoractlError, Unreachable
from loractl.cli.output import is_interactive, print_note

HELP = """\
/adapter NAME        go on with this adapter (or the base), with what was said so far
/compare NAME NAME   ask two at once, answers side by side
/models              what this server has for you
/system TEXT         begin anew with this instruction
/reset               forget what was said
/quit                leave (also end of input)"""


@dataclass(slots=True)
class Side:
    """One model's view of the conversation."""

    model: str
    messages: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    answer: str = ""
    first_token_s: float | None = None
    failure: str | None = None


class ChatServer:
    """The few calls of a chat, against any OpenAI-compatible server."""

    def __init__(self, url: str, key: str | None, *, max_tokens: int) -> None:
        self._url = url.rstrip("/")
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._max_tokens = max_tokens

    def models(self) -> list[dict[str, Any]]:
        """What may be asked for; raises Unreachable."""
        import httpx

        try:
            response = httpx.get(f"{self._url}/v1/models", headers=self._headers, timeout=10.0)
        except httpx.HTTPError as error:
            raise Unreachable(f"no server answers at {self._url}", hint="start one: `loractl serve BASE`") from error
        if not response.is_success:
            raise LoractlError(f"{self._url}: {_reason(response)}")
        models: list[dict[str, Any]] = response.json()["data"]
        return models

    def answer(self, side: Side) -> Iterator[str]:
        """Stream one answer, piece by piece; what goes wrong is left in `side.failure`."""
        import httpx

        body = {"model": side.model, "messages": side.messages, "max_tokens": self._max_tokens, "stream": True}
        url, started = f"{self._url}/v1/chat/completions", time.monotonic()
        try:
            with httpx.stream("POST", url, json=body, headers=self._headers, timeout=600.0) as response:
                if not response.is_success:
                    response.read()
                    side.failure = _reason(response)
                    return
                for line in response.iter_lines():
                    piece = _piece(line, side)
                    if piece:
                        if side.first_token_s is None:
                            side.first_token_s = time.monotonic() - started
                        side.answer += piece
                        yield piece
        except httpx.HTTPError as error:
            side.failure = f"the connection broke: {type(error).__name__}"


def _piece(line: str, side: Side) -> str:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return ""
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        side.failure = event["error"]["message"]
        return ""
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


def _reason(response: Any) -> str:
    try:
        error = response.json()["error"]
        return f"{error['message']}" + (f" ({error['hint']})" if error.get("hint") else "")
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"


class Conversation:
    """What was said, to one side or to two."""

    def __init__(self, server: ChatServer, model: str) -> None:
        self._server = server
        self.sides = [Side(model)]

    def say(self, text: str) -> None:
        """Ask every side, and show the answers as they come."""
        for side in self.sides:
            side.messages.append({"role": "user", "content": text})
            side.answer, side.first_token_s, side.failure = "", None, None
        if len(self.sides) == 1:
            for piece in self._server.answer(self.sides[0]):
                click.echo(piece, nl=False)
            click.echo()
        else:
            self._say_to_two()
        for side in self.sides:
            if side.failure is not None:
                print_note(f"{side.model}: {side.failure}")
                side.messages.pop()
            else:
                side.messages.append({"role": "assistant", "content": side.answer})

    def command(self, line: str) -> bool:
        """Do what a line with a slash says; False when the chat is over."""
        name, *words = line.split()
        if name in {"/quit", "/exit"}:
            return False
        if name in {"/adapter", "/model"} and len(words) == 1:
            self.sides = [Side(words[0], list(self.sides[0].messages))]
            click.echo(f"now {words[0]}")
        elif name == "/compare" and len(words) == 2:
            self.sides = [Side(model, list(self.sides[0].messages)) for model in words]
            click.echo(f"now {words[0]} beside {words[1]}")
        elif name == "/models":
            for model in self._server.models():
                click.echo(model["id"])
        elif name == "/reset":
            self.sides = [Side(side.model) for side in self.sides]
        elif name == "/system" and words:
            text = line.partition(" ")[2]
            self.sides = [Side(side.model, [{"role": "system", "content": text}]) for side in self.sides]
        else:
            click.echo(HELP)
        return True

    def _say_to_two(self) -> None:
        threads = [threading.Thread(target=self._collect, args=(side,), daemon=True) for side in self.sides]
        for thread in threads:
            thread.start()
        if is_interactive():
            from rich.live import Live

            with _unechoed(), Live(self._columns(), refresh_per_second=10) as live:
                while any(thread.is_alive() for thread in threads):
                    time.sleep(0.05)
                    live.update(self._columns())
                live.update(self._columns())
            return
        for side, thread in zip(self.sides, threads, strict=True):
            thread.join()
            click.echo(f"--- {side.model}\n{side.answer}")

    def _collect(self, side: Side) -> None:
        for _ in self._server.answer(side):
            pass

    def _columns(self) -> Any:
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(expand=True)
        for _ in self.sides:
            table.add_column(ratio=1)
        panels = []
        for side in self.sides:
            waited = "" if side.first_token_s is None else f"first token {side.first_token_s:.2f} s"
            panels.append(Panel(Text(side.answer), title=Text(side.model), subtitle=Text(waited)))
        table.add_row(*panels)
        return table


@contextlib.contextmanager
def _unechoed() -> Iterator[None]:
    """Keep keys that are pressed meanwhile from breaking up the panels; they are read when the answers are there."""
    import termios

    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


@click.command(short_help="Talk to an adapter, or to two side by side.")
@click.option("--model", help="Adapter to begin with: TEAM/NAME[@REVISION], a local name, or the base (default).")
@click.option("--server", "url", envvar="LORACTL_SERVER", default="http://127.0.0.1:8800", show_default=True)
@click.option("--key", envvar="LORACTL_API_KEY", help="An API key of the server.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Longest answer.")
def chat(*, model: str | None, url: str, key: str | None, max_tokens: int) -> None:
    """Talk to an adapter, or to two side by side.

    A line that begins with a slash is a command: /help lists them.

    \b
    Examples:
      loractl chat --model team/reviews@prod
      echo 'A joyless bore.' | loractl chat --model team/reviews
    """
    server = ChatServer(url, key, max_tokens=max_tokens)
    models = server.models()
    base = next((each["id"] for each in models if not each.get("parent")), models[0]["id"] if models else "")
    talk = Conversation(server, model or base)
    prompt = "> " if is_interactive() else ""
    if prompt:
        print_note(f"{talk.sides[0].model} at {url}; /help lists commands")
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line.startswith("/"):
            if not talk.command(line):
                return
        elif line:
            talk.say(line)
