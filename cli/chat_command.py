"""`loractl chat`: a conversation in the terminal, with one adapter or with two side by side. Loads no model."""

import contextlib
import importlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import click

from loractl.adapters.errors import LoractlError, NotFound
from loractl.cli.output import print_note
from loractl.cli.server_access import bearer, get_json, reason, server_option
from loractl.cli.word_wrap import WordWrap

HELP = """\
/adapter NAME        go on with this adapter (or the base), with what was said so far
/compare NAME NAME   ask two at once, answers side by side
/models              what this server has for you
/system TEXT         begin anew with this instruction
/reset               forget what was said
/quit                leave (also end of input); Ctrl-C stops an answer"""


@dataclass(slots=True)
class Side:
    """One model's view of the conversation."""

    model: str
    messages: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    answer: str = ""
    first_token_s: float | None = None
    is_cut: bool = False
    """Whether the answer was longer than it may be."""
    failure: str | None = None


class ChatServer:
    """The few calls of a chat, against any OpenAI-compatible server."""

    def __init__(self, url: str, key: str | None, *, max_tokens: int) -> None:
        self._url = url
        self._key = key
        self._max_tokens = max_tokens

    def models(self) -> list[dict[str, Any]]:
        """What may be asked for; raises Unreachable or NotAllowed."""
        models: list[dict[str, Any]] = get_json(self._url, "/v1/models", self._key)["data"]
        return models

    def check(self, model: str) -> None:
        """Raise NotFound, with the server's reason, for what would not be answered."""
        import httpx

        if any(each["id"] == model for each in self.models()):
            return
        url = f"{self._url}/v1/models/{quote(model, safe='/@')}"
        with contextlib.suppress(httpx.HTTPError):
            response = httpx.get(url, headers=bearer(self._key), timeout=60.0)
            # A server that lacks this route has said nothing about the model.
            if response.status_code == HTTPStatus.NOT_FOUND and b'"error"' in response.content:
                message, hint = reason(response)
                raise NotFound(message, hint=hint)

    def answer(self, side: Side) -> Iterator[str]:
        """Stream one answer, piece by piece; what goes wrong is left in `side.failure`."""
        import httpx

        body = {"model": side.model, "messages": side.messages, "max_tokens": self._max_tokens, "stream": True}
        url, started = f"{self._url}/v1/chat/completions", time.monotonic()
        try:
            with httpx.stream("POST", url, json=body, headers=bearer(self._key), timeout=600.0) as response:
                if not response.is_success:
                    response.read()
                    message, hint = reason(response)
                    side.failure = f"{message} ({hint})" if hint else message
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
    side.is_cut = side.is_cut or any(choice.get("finish_reason") == "length" for choice in event["choices"])
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


class Conversation:
    """What was said, to one side or to two."""

    def __init__(self, server: ChatServer, model: str) -> None:
        self._server = server
        self.sides = [Side(model)]
        self.has_failed = False
        """Whether anything was left without an answer."""

    def say(self, text: str) -> None:
        """Ask every side, and show the answers as they come; Ctrl-C ends them and keeps what has come."""
        for side in self.sides:
            side.messages.append({"role": "user", "content": text})
            side.answer, side.first_token_s, side.is_cut, side.failure = "", None, False, None
        try:
            with _unechoed():
                if len(self.sides) == 1:
                    self._say_to_one(self.sides[0])
                else:
                    self._say_to_two()
        except KeyboardInterrupt:
            if not _is_terminal():
                raise
            click.echo()
            print_note("(stopped)")
        for side in self.sides:
            if side.failure is not None:
                self.has_failed = True
                print_note(f"{side.model}: {side.failure}")
            elif side.is_cut and _is_terminal():
                print_note(f"({side.model} had more to say: --max-tokens makes answers longer)")
            if side.answer and side.failure is None:
                side.messages.append({"role": "assistant", "content": side.answer})
            else:
                side.messages.pop()

    def command(self, line: str) -> bool:
        """Do what a line with a slash says; False when the chat is over."""
        name, *words = line.split()
        if name in {"/quit", "/exit"}:
            return False
        if name in {"/adapter", "/model"} and len(words) == 1:
            if self._may_ask(*words):
                self.sides = [Side(words[0], list(self.sides[0].messages))]
                click.echo(f"now {words[0]}")
        elif name == "/compare" and len(words) == 2:
            if self._may_ask(*words):
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

    def _may_ask(self, *models: str) -> bool:
        """Whether all of them can be asked; says why not."""
        try:
            for model in models:
                self._server.check(model)
        except LoractlError as error:
            print_note(f"{error.message}" + (f" ({error.hint})" if error.hint else ""))
            return False
        return True

    def _say_to_one(self, side: Side) -> None:
        width = shutil.get_terminal_size().columns if _is_terminal() else sys.maxsize
        wrap = WordWrap(lambda text: click.echo(text, nl=False), width=width)
        for piece in self._server.answer(side):
            wrap.feed(piece)
        wrap.end_word()
        if side.answer:
            click.echo()

    def _say_to_two(self) -> None:
        threads = [threading.Thread(target=self._collect, args=(side,), daemon=True) for side in self.sides]
        for thread in threads:
            thread.start()
        if _is_terminal():
            from rich.live import Live

            with Live(self._columns(), refresh_per_second=10) as live:
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


def _is_terminal() -> bool:
    """Whether a person types and reads."""
    return sys.stdin.isatty() and sys.stdout.isatty()


@contextlib.contextmanager
def _unechoed() -> Iterator[None]:
    """Keep keys that are pressed meanwhile from breaking up the answers; they are read when the answers are there."""
    if not _is_terminal():
        yield
        return
    import termios

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
@server_option
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
    if model is not None:
        server.check(model)
    talk = Conversation(server, model or base)
    prompt = ""
    if _is_terminal():
        prompt = "> "
        print_note(f"{talk.sides[0].model} at {url}; /help lists commands")
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # gives `input` arrows and a history
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            break
        if line.startswith("/"):
            if not talk.command(line):
                break
        elif line:
            talk.say(line)
    if talk.has_failed and not prompt:
        raise LoractlError("not every line got its answer", hint="the reasons stand above")
