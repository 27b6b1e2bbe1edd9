"""`loractl push`, `pull`, `list`, `show`, `check`: adapters between this machine and a hub."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loractl.adapters.byte_sizes import file_size
from loractl.adapters.errors import AdapterInvalid, RepoNotFound, RevisionNotFound, UsageError
from loractl.adapters.reference import DEFAULT_REVISION, AdapterRef, parse_reference
from loractl.cli.context import adapter_cache, hub_option, json_option, open_hub
from loractl.cli.output import percent, print_json, print_note, print_table

if TYPE_CHECKING:
    from loractl.adapters.validation import ValidationRecord
    from loractl.hub.client import HubClient
    from loractl.hub.wire import ChannelView

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command(short_help="Put an adapter folder into the hub as the next version.")
@click.argument("folder", type=_FOLDER)
@click.argument("reference", metavar="TEAM/NAME")
@click.option("--channel", default=DEFAULT_REVISION, show_default=True, help="The channel that shall point to it.")
@click.option("--message", "-m", default="", help="Why this version was made.")
@click.option("--base", type=_FOLDER, help="The base's folder, for an adapter whose loractl.json does not pin one.")
@click.option("--private", is_flag=True, help="Make a new repo visible only to tokens that name it.")
@click.option("--gate", "gates", multiple=True, help='Refuse a worse one: "accuracy>=prod", "eval_loss<=prev".')
@hub_option
@json_option
def push(
    *,
    folder: Path,
    reference: str,
    channel: str,
    message: str,
    base: Path | None,
    private: bool,
    gates: tuple[str, ...],
    hub_url: str | None,
    as_json: bool,
) -> None:
    """Put an adapter folder into the hub as the next version.

    The hub's checks run here first. The same content again makes no new version.

    \b
    Examples:
      loractl push out/movies demo/movies
      loractl push out/movies demo/movies --channel staging -m "more rows"
      loractl push out/movies demo/movies --gate "accuracy>=prod" --gate "eval_loss<=prev"
    """
    ref = parse_reference(reference)
    if ref.revision != DEFAULT_REVISION:
        raise UsageError(f"{reference}: a push makes its own version", hint=f"use --channel {ref.revision}")
    if base is not None:
        _pin_base(folder, base)
    record = _validate(folder, base=base, must_pin_base=True)
    if record.rejections:
        raise AdapterInvalid(
            f"{folder}: {record.rejections[0].message}",
            hint=record.rejections[0].hint or f"`loractl check {folder}` shows every finding",
        )
    with open_hub(hub_url) as hub:
        _pass_gates(hub, gates, folder, ref, channel=channel)
        pushed = hub.push(folder, ref, channel=channel, message=message, private=private)
    if as_json:
        print_json(_as_dict(pushed))
        return
    if pushed.created:
        print_note(f"pushed {pushed.repo_id}@{pushed.version or pushed.commit[:12]}, {channel} points to it")
    else:
        print_note(f"{channel} of {pushed.repo_id} holds this very adapter already; nothing was sent")
    click.echo(f"{pushed.repo_id}@{pushed.version or pushed.commit}")


@click.command(short_help="Fetch an adapter from the hub.")
@click.argument("reference", metavar="REF")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Copy the files into this new folder.")
@hub_option
@json_option
def pull(*, reference: str, out: Path | None, hub_url: str | None, as_json: bool) -> None:
    """Fetch an adapter from the hub.

    Prints the folder that holds it: the cache's, or --out. What is in the cache already is not sent again.

    \b
    Examples:
      loractl pull demo/movies@prod
      loractl pull demo/movies@v2 --out movies-v2
    """
    ref = parse_reference(reference)
    if out is not None and out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty", hint="name a new folder")
    cache = adapter_cache()
    with open_hub(hub_url) as hub:
        resolved = hub.resolve(ref)
        with cache.pin(resolved.digest):
            folder = hub.fetch(resolved, cache)
            if out is not None:
                # Files of the cache are read-only and shared; a copy is the person's own.
                shutil.copytree(folder, out, dirs_exist_ok=True, copy_function=shutil.copyfile)
                folder = out
    if resolved.yanked is not None:
        print_note(f"warning: {ref} was withdrawn: {resolved.yanked}")
    if as_json:
        print_json(_as_dict(resolved) | {"folder": str(folder)})
        return
    print_note(f"{ref} is {resolved.version or resolved.commit[:12]}, {resolved.digest}")
    click.echo(str(folder))


@click.command("list", short_help="List the adapters in the hub.")
@click.option("--base", help="Only adapters of this base: its id or its fingerprint.")
@click.option("--text", help="Only adapters with this in name, base, task or tags.")
@click.option("--task", help="Only adapters for this task.")
@click.option("--rank", type=click.IntRange(1), help="Only adapters of this rank.")
@click.option("--namespace", help="Only adapters of this team.")
@click.option("--author", help="Only adapters pushed by this token, by its name.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many.")
@hub_option
@json_option
def list_adapters(*, limit: int, hub_url: str | None, as_json: bool, **filters: Any) -> None:
    """List the adapters in the hub.

    \b
    Examples:
      loractl list --base smollm2-135m-instruct
      loractl list --json | jq -r '.[].repo_id'
    """
    with open_hub(hub_url) as hub:
        found = list(hub.list_adapters(limit=limit, **filters))
    if as_json:
        print_json([_as_dict(adapter) for adapter in found])
        return
    rows = [
        {
            "adapter": adapter.repo_id,
            "version": adapter.version,
            "base": adapter.base_id,
            "rank": adapter.rank,
            "size": file_size(adapter.size_bytes),
            "channels": " ".join(f"{name}={target[:12]}" for name, target in sorted(adapter.channels.items())),
            "updated": adapter.updated_at[:16],
        }
        for adapter in found
    ]
    columns = ["adapter", "version", "base", "rank", "size", "channels", "updated"]
    print_table(columns, rows, as_json=False, empty="no adapters; `loractl push DIR TEAM/NAME` makes the first")


@click.command(short_help="Show one adapter: versions, channels, lineage, checks.")
@click.argument("reference", metavar="REF")
@hub_option
@json_option
def show(*, reference: str, hub_url: str | None, as_json: bool) -> None:
    """Show one adapter: versions, channels, lineage, checks.

    \b
    Examples:
      loractl show demo/movies
      loractl show demo/movies@prod --json | jq .manifest.metrics
    """
    with open_hub(hub_url) as hub:
        detail = hub.show(parse_reference(reference))
    if as_json:
        print_json(_as_dict(detail))
        return
    resolved, manifest = detail.resolved, detail.manifest or {}
    data = manifest.get("data") or {}
    facts = {
        "adapter": f"{detail.repo_id}@{resolved.version or resolved.commit[:12]}",
        "digest": resolved.digest,
        "base": resolved.base_id,
        "fingerprint": resolved.base_fingerprint,
        "rank": resolved.rank,
        "targets": ", ".join(manifest.get("targets") or []) or None,
        "size": file_size(resolved.size_bytes),
        "data": data.get("digest") and f"{data['digest'][:19]}, {data.get('num_rows')} rows",
        "metrics": ", ".join(f"{name} {value:.4g}" for name, value in (manifest.get("metrics") or {}).items()) or None,
        "parent": detail.parent or manifest.get("parent"),
        "downloads": detail.num_downloads,
        "withdrawn": resolved.yanked,
    }
    for name, value in facts.items():
        if value is not None:
            click.echo(f"{name:<12} {value}")
    channels = [
        {"channel": one.channel, "version": one.version or one.commit[:12], "canary": _canary(one)}
        for one in detail.channels
    ]
    columns = ["channel", "version", *(["canary"] if any(one["canary"] for one in channels) else [])]
    click.echo("")
    print_table(columns, channels, as_json=False, empty="no channels")
    versions = [
        {"version": one.version, "created": one.created_at[:16], "by": one.author, "message": one.message}
        for one in detail.versions
    ]
    click.echo("")
    print_table(["version", "created", "by", "message"], versions, as_json=False, empty="no versions")
    for finding in detail.validation.findings if detail.validation else []:
        print_note(f"{finding.level}: {finding.code} {finding.message}")


@click.command(short_help="Run the hub's checks on an adapter folder, offline.")
@click.argument("folder", type=_FOLDER)
@click.option("--base", type=_FOLDER, help="The base's folder: its shapes are compared too.")
@json_option
def check(*, folder: Path, base: Path | None, as_json: bool) -> int:
    """Run the hub's checks on an adapter folder, offline.

    Exits with 3 when the hub would refuse it.

    \b
    Examples:
      loractl check out/movies
      loractl check out/movies --base bases/smollm2-135m-instruct --json
    """
    record = _validate(folder, base=base, must_pin_base=False)
    if as_json:
        print_json(_as_dict(record) | {"verdict": record.verdict})
    else:
        rows = [{"level": one.level, "check": one.code, "finding": one.message} for one in record.findings]
        print_table(["level", "check", "finding"], rows, as_json=False, empty="no findings")
        print_note(f"{folder}: {record.verdict}")
        for hint in dict.fromkeys(one.hint for one in record.rejections if one.hint):
            print_note(f"hint: {hint}")
    return AdapterInvalid.exit_code if record.rejections else 0


def _pass_gates(hub: "HubClient", gates: Sequence[str], folder: Path, ref: AdapterRef, *, channel: str) -> None:
    """Compare the folder's metrics with those of the revisions that the gates name; raises CheckFailed."""
    import msgspec

    from loractl.adapters.gate import PREVIOUS, parse_gate
    from loractl.adapters.manifest import Manifest, load_manifest

    ours = load_manifest(folder) or Manifest()
    for gate in [parse_gate(text) for text in gates]:
        theirs = None
        if gate.number is None:
            revision = channel if gate.other == PREVIOUS else gate.other
            try:
                found = hub.show(parse_reference(f"{ref.repo_id}@{revision}"))
            except (RepoNotFound, RevisionNotFound):
                if gate.other != PREVIOUS:
                    raise
                print_note(f"gate {gate.metric}: {channel} of {ref.repo_id} points nowhere yet")
                continue
            theirs = msgspec.convert(found.manifest or {}, Manifest)
        print_note(gate.check(ours, theirs))


def _validate(folder: Path, *, base: Path | None, must_pin_base: bool) -> "ValidationRecord":
    from loractl.adapters.validation import FolderTree, Policy, shapes_from_folder, validate_tree

    shapes = shapes_from_folder(base) if base is not None else None
    policy = Policy(base_pin="reject" if must_pin_base else "warn")
    return validate_tree(FolderTree(folder), policy=policy, base=shapes)


def _pin_base(folder: Path, base: Path) -> None:
    """Write the base's identity into the folder's manifest, unless it pins this base already."""
    from loractl.adapters.base_identity import check_same_base, identify_base
    from loractl.adapters.manifest import Manifest, load_manifest, save_manifest

    identity = identify_base(base)
    manifest = load_manifest(folder) or Manifest()
    if manifest.base is not None:
        check_same_base(manifest.base, identity, adapter=folder)
        return
    manifest.base = identity.pin()
    save_manifest(manifest, folder)
    print_note(f"wrote {folder}/loractl.json: base {identity.id}, {identity.fingerprint[:19]}")


def _canary(channel: "ChannelView") -> str | None:
    canary = channel.canary
    if canary is None:
        return None
    return f"{percent(canary.share)} {canary.version or canary.commit[:12]}, by {canary.by} at {canary.at[:16]}"


def _as_dict(value: object) -> dict[str, Any]:
    import msgspec

    document = msgspec.to_builtins(value)
    assert isinstance(document, dict)
    return document
