"""`loractl chat` in a real terminal: switch adapters, compare two, leave."""

import asyncio
import os
import pty
import select
import subprocess
import sys
import time
from typing import Any

import pytest

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


def _talk(url: str, marks: dict[str, str]) -> int:
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
        terminal.wait_for("now nobody")
        terminal.type("hello")
        terminal.wait_for("no model 'nobody' here")
        terminal.type("/quit")
        return terminal.close()
    finally:
        if terminal.process.poll() is None:
            terminal.process.kill()
            terminal.process.wait()


async def test_chat_switches_and_compares_adapters_in_a_terminal(live: Any) -> None:
    marks = {name: f"<{found.digest[7:15]}>" for name, found in live.serving.source.local.items()}
    assert await asyncio.to_thread(_talk, live.url, marks) == 0


async def test_chat_answers_lines_from_a_pipe(live: Any) -> None:
    command = [sys.executable, "-m", "loractl.cli", "chat", "--server", live.url, "--model", "dogs"]
    done = await asyncio.to_thread(
        subprocess.run, command, input="hello\n", capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"<{live.serving.source.local['dogs'].digest[7:15]}>")
