"""`loractl presets list|show`: settings that come with loractl, each number with its source. Click only."""

import click

from loractl.cli.context import json_option
from loractl.cli.output import print_json, print_table


@click.group(short_help="Show the settings that training can start from.")
def presets() -> None:
    """Show the settings that training can start from."""


@presets.command("list")
@json_option
def list_presets(*, as_json: bool) -> None:
    """List the presets.

    \b
    Examples:
      loractl presets list
    """
    from loractl.adapters.training.recipe import preset_names, preset_text

    rows = [{"preset": name, "what": preset_text(name).partition("\n")[0].lstrip("# ")} for name in preset_names()]
    print_table(["preset", "what"], rows, as_json=as_json, empty="")


@presets.command()
@click.argument("name")
@json_option
def show(*, name: str, as_json: bool) -> None:
    """Show one preset, each number with its source.

    The text is a recipe: save it, change it, and give it to `loractl train`.

    \b
    Examples:
      loractl presets show regret
      loractl presets show regret > mine.yaml
    """
    from loractl.adapters.training.recipe import preset_text

    text = preset_text(name)
    if as_json:
        import yaml

        print_json(yaml.safe_load(text))
        return
    click.echo(text.rstrip())
