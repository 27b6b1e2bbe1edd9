"""`loractl hub`: run a hub and look after it on its own machine. Click only; the rules are in `loractl.hub`."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from loractl.adapters.errors import BadData
from loractl.cli.hub_admin_commands import audit, quota, webhook
from loractl.cli.output import print_json, print_note, print_table
from loractl.hub.settings import HubSettings, read_settings

if TYPE_CHECKING:
    from loractl.hub.fsck import Report

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_ROLES = ("read", "write", "promote", "admin")


def place_options(command: F) -> F:
    """Where a hub's database and blobs are."""
    options = (
        click.option("--root", type=click.Path(path_type=Path), help="Folder of the hub  [default: loractl-hub]"),
        click.option("--database-url", metavar="URL", help="postgresql://user:password@host/name instead of SQLite."),
        click.option("--blobs", metavar="URL", help="s3://bucket/prefix instead of files in the folder."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run one piece of work to its end."""
    return asyncio.run(work)


@click.group()
def hub() -> None:
    """Run and look after an adapter hub."""


hub.add_command(audit)
hub.add_command(quota)
hub.add_command(webhook)


@hub.command()
@place_options
@click.option("--host", metavar="ADDRESS", help="Address to listen on  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on  [default: 8700]")
@click.option("--public-url", metavar="URL", help="The hub's address for clients, behind a proxy.")
@click.option("--anonymous-read", is_flag=True, default=None, help="Let everybody read public repos without a token.")
@click.option("--check-config", is_flag=True, help="Check the settings, print where things would be, and stop.")
def serve(check_config: bool, **flags: Any) -> None:
    """Run the hub until it is stopped.

    The first start makes an admin token and prints it, once.
    """
    from loractl.hub.run import serve_hub

    settings = read_settings(**flags)
    if check_config:
        database = "PostgreSQL" if settings.database_url else "SQLite"
        print_json({"root": str(settings.root), "database": database, "blobs": settings.blobs or "files"})
        return
    serve_hub(settings, announce=_announce)


def _announce(settings: HubSettings, url: str, new_token: str | None) -> None:
    if new_token is not None:
        print_note("This is the hub's first start. Its admin token, shown this once:\n")
        print_note(f"    {new_token}\n")
    print_note(f"hub: {url}   data: {'PostgreSQL' if settings.database_url else settings.root.resolve()}")
    print_note(f"use: export LORACTL_HUB={url} HF_ENDPOINT={url} LORACTL_TOKEN=... HF_TOKEN=...")


@hub.command()
@place_options
def migrate(**place: Any) -> None:
    """Bring the database to this version's schema; `hub serve` does so too, at its start."""
    from loractl.hub.migrate import migrate_hub

    run(migrate_hub(read_settings(**place)))
    print_note("the database has this version's schema")


@hub.group()
def token() -> None:
    """Make, list and revoke tokens."""


@token.command("create")
@place_options
@click.option("--name", required=True, help="Who or what it is for.")
@click.option(
    "--scope", "scopes", type=click.Choice(_ROLES), multiple=True, default=("read",), show_default=True,
    help="May be given several times.",
)  # fmt: skip
@click.option("--pattern", default="*", show_default=True, help="Repos that it is good for, such as 'demo/*'.")
@click.option("--expires-in-days", type=click.IntRange(1, 3660), help="Ends by itself.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def token_create(
    name: str, scopes: tuple[str, ...], pattern: str, expires_in_days: int | None, as_json: bool, **place: Any
) -> None:
    """Make a token and print it, this once."""
    from loractl.hub.run import create_token
    from loractl.hub.wire import TokenCreate

    wanted = TokenCreate(name=name, roles=list(scopes), pattern=pattern, expires_in_days=expires_in_days)  # type: ignore[arg-type]
    created = run(create_token(read_settings(**place), wanted))
    if as_json:
        print_json({"token": created.secret, "id": created.token.id, "name": name, "scopes": list(scopes)})
    else:
        click.echo(created.secret)


@token.command("list")
@place_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def token_list(as_json: bool, **place: Any) -> None:
    """List tokens, without their secrets."""
    from loractl.hub.run import list_tokens

    rows = [
        {
            "id": view.id,
            "name": view.name,
            "scopes": ",".join(view.roles),
            "pattern": view.pattern,
            "ends_with": view.last4,
            "created": view.created_at,
            "expires": view.expires_at,
            "last_used": view.last_used_at,
            "revoked": view.revoked_at,
        }
        for view in run(list_tokens(read_settings(**place)))
    ]
    columns = ("id", "name", "scopes", "pattern", "ends_with", "created", "expires", "last_used", "revoked")
    print_table(columns, rows, as_json=as_json, empty="no tokens: `loractl hub serve` makes the first one")


@token.command("revoke")
@place_options
@click.argument("token_id", metavar="ID")
def token_revoke(token_id: str, **place: Any) -> None:
    """End a token now."""
    from loractl.hub.run import revoke_token

    view = run(revoke_token(read_settings(**place), token_id))
    print_note(f"token {view.id} ({view.name}) is revoked")


@hub.command()
@place_options
@click.option("--grace-hours", type=click.FloatRange(min=0.0), help="Keep what was touched since  [default: 24]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def gc(grace_hours: float | None, as_json: bool, **place: Any) -> None:
    """Take away blobs that nothing names, and uploads that have expired."""
    from loractl.hub.run import collect_garbage

    grace_s = None if grace_hours is None else grace_hours * 3600.0
    done = run(collect_garbage(read_settings(**place), grace_s=grace_s))
    if as_json:
        print_json(asdict(done))
        return
    print_note(
        f"removed {done.num_blobs} blobs ({done.num_bytes:,} bytes), {done.num_orphans} orphans, "
        f"{done.num_uploads} expired uploads, {done.num_staged} staged files"
    )


@hub.command()
@place_options
@click.option("--no-read-data", is_flag=True, help="Compare sizes only; bytes are not read.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def fsck(no_read_data: bool, as_json: bool, **place: Any) -> None:
    """Look whether everything that the hub promises is there, byte for byte."""
    from loractl.hub.run import check_store

    report = run(check_store(read_settings(**place), read_data=not no_read_data))
    if as_json:
        print_json(asdict(report))
    else:
        print_note(
            f"{report.num_commits} commits, {report.num_blobs} blobs, {report.num_bytes:,} bytes; "
            f"{len(report.orphans)} orphans, which gc takes"
        )
    _check_sound(report)


def _check_sound(report: "Report") -> None:
    if not report.is_sound:
        lost = [*report.missing, *report.corrupt, *report.broken_refs]
        raise BadData(
            f"{len(report.missing)} blobs missing, {len(report.corrupt)} corrupt, "
            f"{len(report.broken_refs)} broken refs: {', '.join(lost[:5])}",
            hint="restore them from a backup, or push the same files again",
        )


@hub.command()
@place_options
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def backup(folder: Path, as_json: bool, **place: Any) -> None:
    """Copy the whole hub into FOLDER, while it is in use.

    The database is taken at one moment, then every blob that it names, hashed on the way. A folder that holds an older
    backup takes only what is new. PostgreSQL is saved as SQLite and S3 as files, so a backup restores anywhere.

    \b
    Examples:
      loractl hub backup /backups/hub
    """
    from loractl.hub.backup import back_up

    done = run(back_up(read_settings(**place), folder))
    if as_json:
        print_json(asdict(done))
        return
    print_note(f"{folder}: {done.num_blobs} blobs, {done.num_bytes:,} bytes; {done.num_copied} were new")


@hub.command()
@place_options
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def restore(folder: Path, as_json: bool, **place: Any) -> None:
    """Make a hub of the backup in FOLDER, in a place that holds none.

    Tokens, channels, history and blobs are as they were; --database-url and --blobs may name other kinds than before.

    \b
    Examples:
      loractl hub restore /backups/hub --root hub2
    """
    from loractl.hub.backup import restore as restore_hub

    report = run(restore_hub(read_settings(**place), folder))
    if as_json:
        print_json(asdict(report))
    else:
        print_note(f"{report.num_commits} commits, {report.num_blobs} blobs, {report.num_bytes:,} bytes are there")
    _check_sound(report)
