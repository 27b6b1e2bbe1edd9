"""README's chapters do what they show: their commands are typed into a bash as they stand there, in order."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo_assets import demo_base
from demo_data import write_demo_data
from demo_processes import free_port
from loractl.adapters.manifest import BasePin, DataRecord, Manifest, save_manifest
from pushed_files import write_adapter
from run_transcript import Bash, Typed, commands_of, first_difference

README = (Path(__file__).parent.parent / "README.md").read_text()
_TOKEN = re.compile(r"^ +(lch_\S+)$", re.MULTILINE)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A person's folder; paths of the chapters begin here."""
    return tmp_path


@pytest.fixture
def bash(home: Path) -> Iterator[Bash]:
    # The command of this environment, whichever is on the path.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shell = Bash(home, {"PATH": path})
    yield shell
    shell.close()


def test_transcripts_are_told_from_prose_and_compared_line_by_line() -> None:
    shown = ["shown ... here", "...", "last"]
    lines = ["", "## A", "words", "", "    $ one \\", "      two   # why", *(f"    {line}" for line in shown)]
    text = "\n".join([*lines, "", "    code", "", "    $ stays &  # so", "", "## B", ""])
    assert commands_of(text, "A") == [
        Typed("one        two   # why", shown),
        Typed("stays &  # so", []),
    ]
    assert [command.stays for command in commands_of(text, "A")] == [False, True]
    assert first_difference(shown, "x\nshown this here\ny\nlast\n") is None
    assert first_difference(["last", "shown ... here"], "shown this here\nlast\n") == "shown ... here"
    assert first_difference(["las"], "last\n") == "las"


def _run_chapter(
    bash: Bash, chapter: str, *, stands_for: dict[str, str], varies: tuple[str, ...] = (), num_commands: int
) -> None:
    """Type every command; what the hub's first start prints as its token is typed for `lch_...`.

    Shown lines with a word of `varies` tell of the machine and are not compared.
    """
    commands = commands_of(README, chapter)
    assert len(commands) >= num_commands
    for command in commands:
        text, shown = command.text, [line for line in command.shown if not any(word in line for word in varies)]
        for name, value in stands_for.items():
            text, shown = text.replace(name, value), [line.replace(name, value) for line in shown]
        ran = bash.type(Typed(text, shown))
        assert ran.exit_code == 0, f"$ {command.text}\n{ran.output}"
        missing = first_difference(shown, ran.output)
        assert missing is None, f"$ {command.text}\nlacks: {missing}\n{ran.output}"
        if printed := _TOKEN.search(ran.output):
            stands_for = stands_for | {"lch_...": printed[1]}


@pytest.mark.slow
@pytest.mark.e2e
def test_hub_chapter(bash: Bash, home: Path) -> None:
    """A free port stands for 8700; nothing else is changed."""
    for number, name in enumerate(("reviews", "better"), 1):
        folder = write_adapter(home / "runs" / name, seed=number)
        manifest = Manifest(
            base=BasePin(id="smollm2-135m-instruct", fingerprint="sha256:" + "0" * 64),
            task="sentiment",
            rank=4,
            metrics={"eval_loss": 0.2 / number},
            data=DataRecord(digest="sha256:" + f"{number}" * 64, num_rows=1000 * number),
        )
        save_manifest(manifest, folder)
    port = str(free_port())
    bash.type(Typed(f"export LORACTL_HUB_PORT={port}"))
    _run_chapter(bash, "Hub", stands_for={"8700": port}, num_commands=15)


@pytest.mark.slow
@pytest.mark.real_model
def test_train_chapter(bash: Bash, home: Path) -> None:
    """On the demo's own base and reviews, whose figures the chapter shows."""
    data = write_demo_data(home / "data", num_movies=1800, num_products=1, num_verdicts=1, num_held_out=500)
    data.movies.rename(home / "reviews.csv")
    (home / "smollm2").symlink_to(demo_base())
    _run_chapter(bash, "Train", stands_for={}, varies=("GiB",), num_commands=2)
