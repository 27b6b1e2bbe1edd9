"""What is listed is what is there: packages, commands and the error tree."""

import tomllib
from pathlib import Path

from loractl.adapters import errors
from loractl.cli.main import COMMANDS, SUMMARIES

ROOT = Path(__file__).parent.parent


def _packages_on_disk() -> set[str]:
    tops = ("adapters", "hub", "server", "cli")
    return {
        "loractl." + ".".join(path.parent.relative_to(ROOT).parts)
        for top in tops
        for path in (ROOT / top).rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }


def test_listed_packages_equal_those_on_disk() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == _packages_on_disk()


def test_every_package_is_marked_as_typed() -> None:
    assert all((ROOT / top / "py.typed").is_file() for top in ("adapters", "hub", "server", "cli"))


def _tree(cls: type[errors.LoractlError]) -> list[type[errors.LoractlError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in _tree(child))]


def test_error_tree_is_drawn_as_it_is() -> None:
    drawn = errors.__doc__ or ""
    classes = _tree(errors.LoractlError)
    assert len({cls.code for cls in classes}) == len(classes)
    for cls in classes:
        line = next(line for line in drawn.splitlines() if f" {cls.__name__} " in line and cls.code in line)
        assert line.split(cls.__name__)[1].split()[:3] == [cls.code, str(cls.status), str(cls.exit_code)]


def test_every_command_has_a_summary() -> None:
    assert COMMANDS.keys() == SUMMARIES.keys()
