"""`loractl promote`, `rollback`, `history`: where channels point, and how they came there."""

import click
import msgspec

from loractl.adapters.errors import UsageError
from loractl.adapters.reference import DEFAULT_REVISION, AdapterRef, parse_reference
from loractl.cli.context import hub_option, json_option, open_hub
from loractl.cli.output import print_json, print_note, print_table


@click.command(short_help="Move a channel to a revision.")
@click.argument("reference", metavar="REF")
@click.argument("channel")
@click.option("--reason", "-m", default="", help="Why; it is kept in the history.")
@click.option("--expected", metavar="COMMIT", help="Move only if the channel still points here ('none': only if new).")
@hub_option
@json_option
def promote(
    *, reference: str, channel: str, reason: str, expected: str | None, hub_url: str | None, as_json: bool
) -> None:
    """Move a channel to a revision.

    Servers that answer by this channel take the new version within a second.

    \b
    Examples:
      loractl promote demo/movies@v2 prod -m "accuracy 0.94"
    """
    ref = parse_reference(reference)
    old: str | msgspec.UnsetType | None = msgspec.UNSET if expected is None else expected
    with open_hub(hub_url) as hub:
        move = hub.promote(ref, channel, expected_old=None if old == "none" else old, reason=reason)
    _print_move(move, as_json=as_json)


@click.command(short_help="Move a channel back to where it was.")
@click.argument("reference", metavar="TEAM/NAME")
@click.argument("channel")
@click.option("--to", metavar="REVISION", help="A revision that the channel has pointed at before.")
@click.option("--reason", "-m", default="", help="Why; it is kept in the history.")
@hub_option
@json_option
def rollback(*, reference: str, channel: str, to: str | None, reason: str, hub_url: str | None, as_json: bool) -> None:
    """Move a channel back to where it was.

    \b
    Examples:
      loractl rollback demo/movies prod -m "wrong on sarcasm"
    """
    with open_hub(hub_url) as hub:
        move = hub.rollback(_repo(reference), channel, to=to, reason=reason)
    _print_move(move, as_json=as_json)


@click.command(short_help="Show who moved which channel, when and why.")
@click.argument("reference", metavar="TEAM/NAME")
@click.argument("channel", required=False)
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most so many.")
@hub_option
@json_option
def history(*, reference: str, channel: str | None, limit: int, hub_url: str | None, as_json: bool) -> None:
    """Show who moved which channel, when and why.

    \b
    Examples:
      loractl history demo/movies prod
    """
    with open_hub(hub_url) as hub:
        moves = hub.history(_repo(reference), channel=channel, limit=limit)
    if as_json:
        print_json([msgspec.to_builtins(move) for move in moves])
        return
    rows = [
        {
            "at": move.at[:19],
            "channel": move.channel,
            "kind": move.kind,
            "from": _target(move.old_version, move.old_commit),
            "to": _target(move.new_version, move.new_commit),
            "by": move.by,
            "reason": move.reason,
        }
        for move in moves
    ]
    columns = ["at", "channel", "kind", "from", "to", "by", "reason"]
    print_table(columns, rows, as_json=False, empty=f"no channel of {reference} has moved")


def _repo(reference: str) -> AdapterRef:
    ref = parse_reference(reference)
    if ref.revision != DEFAULT_REVISION:
        raise UsageError(f"{reference}: a revision makes no sense here", hint=f"write {ref.repo_id}")
    return ref


def _print_move(move: msgspec.Struct, *, as_json: bool) -> None:
    from loractl.hub.wire import ChannelMove

    assert isinstance(move, ChannelMove)
    if as_json:
        print_json(msgspec.to_builtins(move))
        return
    old = _target(move.old_version, move.old_commit)
    new = _target(move.new_version, move.new_commit)
    print_note(f"{move.channel} of {move.repo_id}: {old or 'new'} -> {new}")
    click.echo(f"{move.repo_id}@{new}")


def _target(version: str | None, commit: str | None) -> str | None:
    return version or (commit[:12] if commit else None)
