"""Runs a chapter of a document as a person would type it: one bash, one command after the other, in a home of its own.

A block of lines indented by four blanks is a transcript: `$ ` begins a command, what follows is what it shows. `...` in
a shown line stands for anything, a line of `...` for any lines. A command that ends in `&` stays, and the next one is
typed once it has shown what it should; all end with the chapter. A comment is bash's own business.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_PATIENCE_S = 600.0
_LOOK_EVERY_S = 0.05


@dataclass(slots=True)
class Typed:
    """One command of a document, and the lines below it."""

    text: str
    shown: list[str] = field(default_factory=list)

    @property
    def stays(self) -> bool:
        return re.sub(r"\s+#.*", "", self.text).endswith("&")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What came of it."""

    command: str
    exit_code: int
    output: str


def commands_of(text: str, chapter: str) -> list[Typed]:
    """The commands of the chapter `## chapter`, in order."""
    found: list[Typed] = []
    is_open = False
    for line in text.partition(f"\n## {chapter}\n")[2].partition("\n## ")[0].replace("\\\n", " ").splitlines():
        body = line.removeprefix("    ")
        if line.startswith("    $ "):
            found.append(Typed(body.removeprefix("$ ")))
            is_open = True
        elif not line.startswith("    "):
            is_open = False
        elif is_open:
            found[-1].shown.append(body)
    return found


def first_difference(shown: list[str], output: str) -> str | None:
    """The first shown line that the output lacks, or None: all are there, whole and in this order."""
    lines = [line.rstrip() for line in output.splitlines()]
    for wanted in shown:
        if wanted.strip() == "...":
            continue
        pattern = re.compile(".*".join(re.escape(part) for part in wanted.rstrip().split("...")))
        at = next((number for number, line in enumerate(lines) if pattern.fullmatch(line)), None)
        if at is None:
            return wanted
        lines = lines[at + 1 :]
    return None


class Bash:
    """One shell that keeps its directory, its variables and its jobs."""

    def __init__(self, home: Path, environment: Mapping[str, str]) -> None:
        inherited = {name: os.environ[name] for name in ("PATH", "LANG", "LORACTL_CACHE") if name in os.environ}
        self._log = home / ".transcript"
        shutil.rmtree(self._log, ignore_errors=True)
        self._log.mkdir(parents=True)
        self._number = 0
        self._process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=home,
            env=inherited | {"HOME": str(home), "COLUMNS": "140", "NO_COLOR": "1"} | dict(environment),
            text=True,
        )

    def type(self, command: Typed) -> Ran:
        """Type one command and wait until it has ended, or, where it stays, until it has shown what it should."""
        self._number += 1
        out, code = (self._log / f"{self._number}.{name}" for name in ("out", "code"))
        assert self._process.stdin is not None
        self._process.stdin.write(
            f"{{ {command.text}\n}} >{out} 2>&1 </dev/null\necho $? >{code}.part\nmv {code}.part {code}\n"
        )
        self._process.stdin.flush()
        deadline = time.monotonic() + _PATIENCE_S
        while not code.exists() or (command.stays and first_difference(command.shown, out.read_text()) is not None):
            if time.monotonic() > deadline or self._process.poll() is not None:
                break
            time.sleep(_LOOK_EVERY_S)
        text = out.read_text() if out.exists() else ""
        return Ran(command=command.text, exit_code=int(code.read_text()) if code.exists() else -1, output=text)

    def close(self) -> None:
        """End what stayed, then the shell."""
        if self._process.stdin is not None and self._process.poll() is None:
            self._process.stdin.write("for job in $(jobs -p); do kill $job; done; wait; exit\n")
            self._process.stdin.close()
        try:
            self._process.wait(40.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
