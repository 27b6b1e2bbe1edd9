"""The lists of README.md are true: what they name exists, and they leave nothing out."""

import ast
import re
from pathlib import Path

from loractl.hub.app import HF_ROUTES

_HERE = Path(__file__).parent
_NAMED = re.compile(r"`((?:check_\w+|test_matrix)::test_\w+)`")


def _rows(chapter: str) -> list[str]:
    text = (_HERE / "README.md").read_text().partition(f"## {chapter}\n")[2].partition("\n## ")[0]
    return [line for line in text.splitlines() if line.startswith("| ")][1:]


def test_every_named_check_exists() -> None:
    checks = {
        f"{path.stem}::{node.name}"
        for path in _HERE.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    for row in _rows("Calls") + _rows("Traps"):
        named = _NAMED.findall(row.split("|")[-2])
        assert named, row
        assert set(named) <= checks, row


def test_no_trap_is_left_out() -> None:
    assert [row.split("|")[1].strip() for row in _rows("Traps")] == [f"T{number}" for number in range(1, 29)]


def test_no_route_of_the_protocol_is_left_out() -> None:
    routes = {
        re.sub(r"\{(\w+):\w+\}", r"{\1}", path.replace("{namespace:str}/{name:str}", "{repo}"))
        for route in HF_ROUTES
        for path in route.paths
    }
    listed = {word for row in _rows("Calls") for word in re.findall(r"`[A-Z]* ?(/[^`]+)`", row.split("|")[1])}
    assert listed == routes
