"""`loractl chat` in a real terminal: switch adapters, compare two, leave."""

import asyncio
import os
import pty
import select
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from drills import until
from fakes import FakeEngine
from loractl.cli.word_wrap import WordWrap

pytestmark = pytest.mark.e2e


class Terminal:
    """A process on a pseudo terminal: type lines, wait for text."""

    def __init__(self, *command: str) -> None:
        self._side, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        self.seen = ""

    def type(self, line: str) -> None:
        self.seen = ""
        os.write(self._side, f"{line}\n".encode())

    def wait_for(self, *texts: str, timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not all(text in self.seen for text in texts):
            assert time.monotonic() < deadline, self.seen
            if select.select([self._side], [], [], 0.1)[0]:
                self.seen += os.read(self._side, 65536).decode(errors="replace")

    def close(self) -> int:
        code = self.process.wait(20)
        os.close(self._side)
        return code


def _talk(url: str, marks: dict[str, str], engine: FakeEngine) -> int:
    terminal = Terminal(sys.executable, "-m", "loractl.cli", "chat", "--server", url, "--max-tokens", "60")
    try:
        terminal.wait_for("tiny at", "> ")
        terminal.type("the quick fox")
        terminal.wait_for("quick fox")
        terminal.type("/models")
        terminal.wait_for("cats", "dogs")
        terminal.type("/adapter cats")
        terminal.wait_for("now cats")
        terminal.type("hello")
        terminal.wait_for(marks["cats"])
        terminal.type("/compare cats dogs")
        terminal.wait_for("now cats beside dogs")
        terminal.type("hello again")
        terminal.wait_for(marks["cats"], marks["dogs"], "first token")
        terminal.type("/adapter nobody")
        terminal.wait_for("no model 'nobody' here")
        terminal.type("/adapter tiny")
        terminal.wait_for("now tiny")
        engine.step_s = 0.2
        terminal.type("to be stopped")
        # Not by what is seen: the terminal shows what was typed before it is read, and Ctrl-C there leaves the chat.
        asyncio.run(until(lambda: engine._rows))
        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.wait_for("(stopped)", "> ")
        terminal.type("/quit")
        return terminal.close()
    finally:
        if terminal.process.poll() is None:
            terminal.process.kill()
            terminal.process.wait()


async def test_chat_switches_and_compares_adapters_in_a_terminal(live: Any) -> None:
    marks = {name: f"<{found.digest[7:15]}>" for name, found in live.serving.source.local.items()}
    assert await asyncio.to_thread(_talk, live.url, marks, live.engine) == 0
    await until(lambda: not live.engine._rows)


async def test_chat_answers_lines_from_a_pipe(live: Any) -> None:
    command = [sys.executable, "-m", "loractl.cli", "chat", "--server", live.url, "--model", "dogs"]
    done = await asyncio.to_thread(
        subprocess.run, command, input="hello\n", capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"<{live.serving.source.local['dogs'].digest[7:15]}>")


async def test_chat_over_a_pipe_fails_when_its_model_does_not_exist(live: Any) -> None:
    command = [sys.executable, "-m", "loractl.cli", "chat", "--server", f"{live.url}/v1", "--model", "nobody"]
    done = await asyncio.to_thread(
        subprocess.run, command, input="hello\n", capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (7, "")
    assert "no model 'nobody' here" in done.stderr


def test_words_stay_whole_at_the_terminals_edge() -> None:
    written: list[str] = []
    wrap = WordWrap(written.append, width=12)
    for piece in ("The sea", ", the op", "en sea.\n  x = 1 incomprehensibilities 海海海海海海海"):
        wrap.feed(piece)
    wrap.end_word()
    lines = "".join(written).split("\n")
    assert [line.rstrip() for line in lines] == [
        "The sea, the",
        "open sea.",
        "  x = 1",
        "incomprehens",
        "ibilities 海",
        "海海海海海海",
    ]
