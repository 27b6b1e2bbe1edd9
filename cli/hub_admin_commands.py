"""`loractl hub audit`, `quota`, `webhook`: what an admin asks of a running hub. Click only; the rules are its own."""

import re
from typing import Any

import click
import msgspec

from loractl.adapters.errors import Unreachable, UsageError
from loractl.cli.context import hub_option, json_option, open_hub_admin
from loractl.cli.output import print_json, print_note, print_table

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@click.command()
@click.option("--after", type=click.IntRange(0), help="Only lines with a higher id, to go on from an earlier export.")
@click.option("--since", metavar="TIME", help="Only from this time on, such as 2026-11-24T08:00:00Z.")
@click.option("--actor", help="Only what this token did, by its name.")
@click.option("--action", help="Only this, such as channel.promote.")
@click.option("--target", help="Only on this, such as demo/movies.")
@click.option("--limit", type=click.IntRange(1), help="At most so many.")
@hub_option
def audit(*, hub_url: str | None, **wanted: Any) -> None:
    """Print who did what, one JSON object a line, oldest first.

    \b
    Examples:
      loractl hub audit --target demo/movies | jq -r '[.at, .actor, .action] | @tsv'
    """
    with open_hub_admin(hub_url) as hub:
        for line in hub.audit(**wanted):
            click.echo(line)


@click.group()
def quota() -> None:
    """Limit what namespaces may use."""


@quota.command("set")
@click.argument("namespace")
@click.option("--bytes", "size", metavar="SIZE", help="Such as 10GB; 0: no limit; default: the hub's own.")
@click.option("--repos", metavar="NUMBER", help="Likewise, of repos.")
@hub_option
@json_option
def quota_set(*, namespace: str, size: str | None, repos: str | None, hub_url: str | None, as_json: bool) -> None:
    """Limit a namespace.

    \b
    Examples:
      loractl hub quota set demo --bytes 10GB --repos 100
      loractl hub quota set demo --bytes default
    """
    from loractl.hub.admin_wire import QuotaSet

    if size is None and repos is None:
        raise UsageError("nothing to set", hint="--bytes SIZE, --repos NUMBER")
    wanted = QuotaSet(size_bytes=_amount(size, units=True), num_repos=_amount(repos, units=False))
    with open_hub_admin(hub_url) as hub:
        view = hub.set_quota(namespace, wanted)
    _print_quotas([view], as_json=as_json)


@quota.command("list")
@hub_option
@json_option
def quota_list(*, hub_url: str | None, as_json: bool) -> None:
    """List namespaces with their limits and what they use."""
    with open_hub_admin(hub_url) as hub:
        _print_quotas(hub.quotas(), as_json=as_json)


def _amount(text: str | None, *, units: bool) -> "int | msgspec.UnsetType | None":
    if text is None:
        return msgspec.UNSET
    if text == "default":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None or (not units and not text.isdigit()):
        raise UsageError(f"{text!r} is not an amount", hint="a number such as 500MB" if units else "a whole number")
    return int(float(match.group(1)) * unit) if units and not text.isdigit() else int(match.group(1))


def _print_quotas(views: Any, *, as_json: bool) -> None:
    rows = [msgspec.to_builtins(view) for view in views]
    columns = ["namespace", "used_bytes", "quota_bytes", "num_repos", "quota_repos", "is_default"]
    print_table(columns, rows, as_json=as_json, empty="no namespaces")


@click.group()
def webhook() -> None:
    """Have events sent to other services."""


@webhook.command("create")
@click.argument("url")
@click.option("--pattern", default="*", show_default=True, help="Of which repos, such as 'demo/*'.")
@click.option("--kind", "kinds", multiple=True, help="Which events, such as channel.moved; may be given several times.")
@hub_option
@json_option
def webhook_create(*, url: str, pattern: str, kinds: tuple[str, ...], hub_url: str | None, as_json: bool) -> None:
    """Send events to a URL and print the secret that signs them, this once.

    Signatures are those of the Standard Webhooks specification, for which there are libraries in most languages.

    \b
    Examples:
      loractl hub webhook create https://ci.example.com/hooks --pattern 'demo/*' --kind version.created
    """
    from loractl.hub.admin_wire import WebhookCreate

    with open_hub_admin(hub_url) as hub:
        made = hub.create_webhook(WebhookCreate(url=url, pattern=pattern, kinds=list(kinds)))
    if as_json:
        print_json(msgspec.to_builtins(made))
        return
    print_note(f"webhook {made.webhook.id}; its secret, shown this once:")
    click.echo(made.secret)


@webhook.command("list")
@hub_option
@json_option
def webhook_list(*, hub_url: str | None, as_json: bool) -> None:
    """List webhooks, without their secrets."""
    with open_hub_admin(hub_url) as hub:
        rows = [msgspec.to_builtins(view) for view in hub.webhooks()]
    columns = ["id", "url", "pattern", "kinds", "created_by", "created_at"]
    print_table(columns, rows, as_json=as_json, empty="no webhooks: `loractl hub webhook create URL` makes one")


@webhook.command("delete")
@click.argument("number", metavar="ID", type=int)
@hub_option
def webhook_delete(*, number: int, hub_url: str | None) -> None:
    """Send no more to a URL."""
    with open_hub_admin(hub_url) as hub:
        view = hub.delete_webhook(number)
    print_note(f"webhook {view.id} ({view.url}) is gone")


@webhook.command("test")
@click.argument("number", metavar="ID", type=int)
@hub_option
@json_option
def webhook_test(*, number: int, hub_url: str | None, as_json: bool) -> int:
    """Send a test message right now; exits with 9 when it does not arrive."""
    with open_hub_admin(hub_url) as hub:
        result = hub.test_webhook(number)
    if as_json:
        print_json(msgspec.to_builtins(result))
    else:
        print_note("it arrived" if result.delivered else f"it did not arrive: {result.error}")
    return 0 if result.delivered else Unreachable.exit_code


@webhook.command("deliveries")
@click.argument("number", metavar="ID", type=int)
@click.option("--state", type=click.Choice(["pending", "done", "dead"]), help="Only these.")
@click.option("--retry", "retry", metavar="DELIVERY", type=int, help="Send this one again first.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="At most so many.")
@hub_option
@json_option
def webhook_deliveries(
    *, number: int, state: str | None, retry: int | None, limit: int, hub_url: str | None, as_json: bool
) -> None:
    """Show what was sent, is waiting, or was given up."""
    with open_hub_admin(hub_url) as hub:
        if retry is not None:
            hub.retry_delivery(number, retry)
        found = hub.deliveries(number, state=state, limit=limit).deliveries
    rows = [msgspec.to_builtins(view) for view in found]
    columns = ["id", "kind", "repo_id", "state", "num_attempts", "next_at", "last_error", "created_at"]
    print_table(columns, rows, as_json=as_json, empty="nothing was sent")
