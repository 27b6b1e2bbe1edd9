"""The help that people read: light, complete, and the text in tests/cli/help (`make help-snapshots` rewrites it)."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from loractl.cli.main import COMMANDS, SUMMARIES, group

SNAPSHOTS = Path(__file__).parent / "help"
HEAVY = ("torch", "transformers", "litestar", "sqlalchemy", "huggingface_hub", "numpy", "rich")


def _walk(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command, **command.context_settings)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from _walk(child, (*path, name))


def help_texts() -> dict[str, str]:
    """The help of every command, by its words joined with dashes."""
    texts = {}
    for path in _walk(group):
        result = CliRunner().invoke(group, [*path, "--help"], prog_name="loractl", terminal_width=100)
        assert result.exit_code == 0, (path, result.output)
        texts["-".join(("loractl", *path))] = result.output
    return texts


def test_help_equals_its_snapshots() -> None:
    # In a process of its own: click keeps a command's help option from the first context that asks for it.
    done = subprocess.run([sys.executable, __file__, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {path.stem: path.read_text() for path in SNAPSHOTS.glob("*.txt")}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from loractl.cli.main import run; run(['--help']);"
        f" print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_summary_equals_the_commands_own_first_sentence(name: str) -> None:
    command = group.get_command(click.Context(group, **group.context_settings), name)
    assert command is not None
    assert command.get_short_help_str(limit=200) == SUMMARIES[name]


def test_unknown_command_is_a_usage_error() -> None:
    done = subprocess.run([sys.executable, "-m", "loractl.cli", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "trian" in done.stderr


def rewrite_snapshots() -> None:
    SNAPSHOTS.mkdir(exist_ok=True)
    for old in SNAPSHOTS.glob("*.txt"):
        old.unlink()
    for name, text in help_texts().items():
        (SNAPSHOTS / f"{name}.txt").write_text(text)


if __name__ == "__main__":
    if "--json" in sys.argv:
        print(json.dumps(help_texts()))
    else:
        rewrite_snapshots()
