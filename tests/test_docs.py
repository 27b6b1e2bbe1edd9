"""What the documents say is there: every command line parses, every named path exists."""

import re
import shlex
from pathlib import Path

import click
import pytest

from loractl.cli.main import group

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "charts/RUNBOOK.md")
_PATH = re.compile(r"`((?:adapters|hub|server|cli|charts|tests)/[A-Za-z0-9_./-]*)`")


def _text(name: str) -> str:
    path = ROOT / name
    return path.read_text() if path.is_file() else ""


def _command_lines() -> list[str]:
    """Lines of indented or fenced blocks that begin with `loractl` or `$ loractl`, continuations joined."""
    lines = []
    for name in DOCUMENTS:
        for line in _text(name).replace("\\\n", " ").splitlines():
            stripped = line.strip().removeprefix("$ ")
            if line.startswith(("    ", "$ ", "loractl ")) and stripped.startswith("loractl "):
                lines.append(re.split(r"\s+(?:#|\||>|&)", stripped)[0])
    return sorted(set(lines))


@pytest.mark.parametrize("line", _command_lines())
def test_documented_command_line_parses(line: str) -> None:
    words = shlex.split(line)[1:]
    command: click.Command = group
    # With its settings: click keeps a command's help option from the first context that asks for it.
    context = click.Context(group, info_name="loractl", **group.context_settings)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        child = command.get_command(context, words.pop(0))
        assert child is not None, line
        context = click.Context(child, parent=context)
        command = child
    command.make_parser(context).parse_args(words)


def test_documented_paths_exist() -> None:
    named = {match.rstrip("/") for name in DOCUMENTS for match in _PATH.findall(_text(name))}
    assert {path for path in named if not (ROOT / path).exists()} == set()


def test_make_targets_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", _text("Makefile"), flags=re.MULTILINE))
    code = re.compile(r"(?:`|^    (?:\$ )?)make ([a-z][a-z0-9-]+)", flags=re.MULTILINE)
    named = {target for name in DOCUMENTS for target in code.findall(_text(name))}
    assert named
    assert named <= targets
