"""`loractl promote`, `rollback`, `history`: where channels point, and how they came there."""

import click
import msgspec

from loractl.adapters.errors import UsageError
from loractl.adapters.reference import DEFAULT_REVISION, AdapterRef, parse_reference
from loractl.cli.context import hub_option, json_option, open_hub
from loractl.cli.output import percent, print_json, print_note, print_table


def _share(context: click.Context, option: click.Parameter, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a share such as 5% or 0.05", context, option) from None
    if not 0 < share < 1:
        what = f"{text!r}: a share lies between 0% and 100%; for all callers leave --canary out"
        raise click.BadParameter(what, context, option)
    return share


@click.command(short_help="Move a channel to a revision.")
@click.argument("reference", metavar="REF")
@click.argument("channel")
@click.option("--reason", "-m", default="", help="Why; it is kept in the history.")
@click.option("--expected", metavar="COMMIT", help="Move only if the channel still points here ('none': only if new).")
@click.option(
    "--canary", callback=_share, metavar="SHARE", help="Leave the channel, and give this share of callers REF."
)
@hub_option
@json_option
def promote(
    *,
    reference: str,
    channel: str,
    reason: str,
    expected: str | None,
    canary: float | None,
    hub_url: str | None,
    as_json: bool,
) -> None:
    """Move a channel to a revision.

    Servers that answer by this channel take the new version within a second. With --canary the channel stays where it
    is, and servers give a share of its callers the revision, each caller always the same one; promoting without
    --canary ends that for good, and rollback takes it back.

    \b
    Examples:
      loractl promote demo/movies@v2 prod -m "accuracy 0.94"
      loractl promote demo/movies@v3 prod --canary 5%
    """
    ref = parse_reference(reference)
    old: str | msgspec.UnsetType | None = msgspec.UNSET if expected is None else expected
    with open_hub(hub_url) as hub:
        move = hub.promote(ref, channel, expected_old=None if old == "none" else old, reason=reason, share=canary)
    _print_move(move, as_json=as_json)


@click.command(short_help="End a canary, or move a channel back to where it was.")
@click.argument("reference", metavar="TEAM/NAME")
@click.argument("channel")
@click.option("--to", metavar="REVISION", help="A revision that the channel has pointed at before.")
@click.option("--reason", "-m", default="", help="Why; it is kept in the history.")
@hub_option
@json_option
def rollback(*, reference: str, channel: str, to: str | None, reason: str, hub_url: str | None, as_json: bool) -> None:
    """End a channel's canary; without one, move the channel back to where it was.

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
            "share": None if move.share is None else percent(move.share),
            "from": _target(move.old_version, move.old_commit),
            "to": _target(move.new_version, move.new_commit),
            "by": move.by,
            "reason": move.reason,
        }
        for move in moves
    ]
    columns = ["at", "channel", "kind", "share", "from", "to", "by", "reason"]
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
    if move.share is not None:
        print_note(f"{move.channel} of {move.repo_id}: {percent(move.share)} of callers get {new}, the others {old}")
        print_note(f"next: `loractl promote {move.repo_id}@{new} {move.channel}` for all, or `loractl rollback`")
    elif move.kind == "canary-end":
        print_note(f"{move.channel} of {move.repo_id}: nobody gets {old} any more, all get {new}")
    else:
        print_note(f"{move.channel} of {move.repo_id}: {old or 'new'} -> {new}")
    click.echo(f"{move.repo_id}@{new}")


def _target(version: str | None, commit: str | None) -> str | None:
    return version or (commit[:12] if commit else None)
