"""Every preset is a recipe that resolves, and every number in it says where it comes from."""

import json

import pytest

from loractl.adapters.training.recipe import preset_names, preset_text, resolve_recipe
from loractl.cli.main import run


def test_the_seven_presets_are_there() -> None:
    assert preset_names() == ["agent", "article", "classify", "dpo", "qlora", "quick", "regret"]


@pytest.mark.parametrize("name", preset_names())
def test_preset_resolves_and_gives_sources(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    resolve_recipe(preset=name, file=None, settings={})
    lines = preset_text(name).splitlines()
    assert lines[0].startswith("# ")
    numbers = [line for line in lines[1:] if any(character.isdigit() for character in line.partition("#")[0])]
    plain = {"accumulation: 1", "epochs: 1", "epochs: 3", "patience: 2"}
    assert [line for line in numbers if "#" not in line and line.strip() not in plain] == []
    assert run(["presets", "show", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapter"]["rank"] > 0


def test_list_says_what_each_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["presets", "list"]) == 0
    assert "qlora" in capsys.readouterr().out
