"""`loractl yank`, `move`, `delete`: what a release takes back. Click only; the rules are the hub's."""

import click
import msgspec

from loractl.adapters.errors import UsageError
from loractl.adapters.reference import DEFAULT_REVISION, AdapterRef, parse_reference
from loractl.cli.context import hub_option, json_option, open_hub_admin
from loractl.cli.output import is_interactive, print_json, print_note


@click.command(short_help="Withdraw a version, or take that back.")
@click.argument("reference", metavar="REF")
@click.option("--reason", "-m", help="Why; everybody who fetches it is told.")
@click.option("--undo", is_flag=True, help="Take the withdrawal back.")
@hub_option
@json_option
def yank(*, reference: str, reason: str | None, undo: bool, hub_url: str | None, as_json: bool) -> None:
    """Withdraw a version, or take that back.

    A withdrawn version still answers to its exact name, with a warning; channels do not move by themselves.

    \b
    Examples:
      loractl yank demo/movies@v2 -m "trained on the wrong rows"
      loractl yank demo/movies@v2 --undo
    """
    ref = parse_reference(reference)
    if undo == (reason is not None):
        raise UsageError("say why, or take it back", hint='--reason "..." or --undo')
    if "@" not in reference:
        raise UsageError(f"{reference}: which version?", hint=f"write {ref.repo_id}@v2")
    with open_hub_admin(hub_url) as hub:
        resolved = hub.yank(ref, reason)
    if as_json:
        print_json(msgspec.to_builtins(resolved))
        return
    name = f"{resolved.repo_id}@{resolved.version or resolved.commit[:12]}"
    print_note(f"{name} is withdrawn: {reason}" if reason is not None else f"{name} is no longer withdrawn")
    click.echo(name)


@click.command(short_help="Give a repo another name; the old one keeps answering.")
@click.argument("reference", metavar="TEAM/NAME")
@click.argument("to", metavar="TEAM/NAME")
@hub_option
@json_option
def move(*, reference: str, to: str, hub_url: str | None, as_json: bool) -> None:
    """Give a repo another name; the old one keeps answering.

    \b
    Examples:
      loractl move demo/movies films/sentiment
    """
    old, new = _repo(reference), _repo(to)
    with open_hub_admin(hub_url) as hub:
        hub.move(old, new)
    if as_json:
        print_json({"from": old.repo_id, "to": new.repo_id})
        return
    print_note(f"{old.repo_id} is now {new.repo_id}; the old name leads there")
    click.echo(new.repo_id)


@click.command(short_help="Delete a repo with all its versions.")
@click.argument("reference", metavar="TEAM/NAME")
@click.option("--yes", is_flag=True, help="Do not ask.")
@hub_option
@json_option
def delete(*, reference: str, yes: bool, hub_url: str | None, as_json: bool) -> None:
    """Delete a repo with all its versions.

    There is no way back; `loractl yank` withdraws a single version and keeps it.

    \b
    Examples:
      loractl delete demo/movies
    """
    ref = _repo(reference)
    if not yes:
        if not is_interactive():
            raise UsageError(f"deleting {ref.repo_id} takes a confirmation", hint="add --yes")
        typed = click.prompt(f"All versions of {ref.repo_id} will be gone. Its name, to go on", err=True)
        if typed != ref.repo_id:
            raise UsageError(f"{typed!r} is not {ref.repo_id}; nothing was deleted")
    with open_hub_admin(hub_url) as hub:
        hub.delete(ref)
    if as_json:
        print_json({"deleted": ref.repo_id})
        return
    print_note(f"{ref.repo_id} is deleted")


def _repo(reference: str) -> AdapterRef:
    ref = parse_reference(reference)
    if ref.revision != DEFAULT_REVISION:
        raise UsageError(f"{reference}: a revision makes no sense here", hint=f"write {ref.repo_id}")
    return ref
