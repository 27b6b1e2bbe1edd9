"""Which hub a command talks to, and as whom: flags, then environment, then the profile file, then loopback."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from loractl.adapters.errors import BadData, NotAllowed

if TYPE_CHECKING:
    from loractl.adapters.local_cache import AdapterCache
    from loractl.hub.admin_client import HubAdmin
    from loractl.hub.client import HubClient

DEFAULT_HUB = "http://127.0.0.1:8700"

Command = TypeVar("Command", bound=Callable[..., Any])


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `~/.config/loractl/profile.json` may hold; the file must be readable by its owner alone."""

    hub: str | None = None
    token: str | None = None


def hub_option(command: Command) -> Command:
    """Add `--hub URL` to a command."""
    return click.option("--hub", "hub_url", metavar="URL", help="The hub; else LORACTL_HUB, the profile, loopback.")(
        command
    )


def json_option(command: Command) -> Command:
    """Add `--json` to a command that prints a table."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")(command)


def profile_path() -> Path:
    """Where the profile is: LORACTL_PROFILE, else in the user's configuration folder."""
    if named := os.environ.get("LORACTL_PROFILE"):
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "loractl" / "profile.json"


def read_profile() -> Profile:
    """Read the profile; raises NotAllowed when others could read its token, BadData when it cannot be understood."""
    path = profile_path()
    if not path.is_file():
        return Profile()
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise NotAllowed(f"{path}: others can read the token in it", hint=f"chmod 600 {path}")
    try:
        return msgspec.json.decode(path.read_bytes(), type=Profile)
    except msgspec.DecodeError as error:
        raise BadData(f"{path}: {error}", hint='write {"hub": "URL", "token": "..."}') from error


def hub_url(flag: str | None) -> str:
    """The hub's address."""
    return (flag or os.environ.get("LORACTL_HUB") or read_profile().hub or DEFAULT_HUB).rstrip("/")


def hub_token(url: str) -> str | None:
    """The token for a hub; a profile's token goes to the profile's hub alone."""
    if token := os.environ.get("LORACTL_TOKEN"):
        return token
    if file := os.environ.get("LORACTL_TOKEN_FILE"):
        return read_secret(Path(file))
    profile = read_profile()
    return profile.token if (profile.hub or DEFAULT_HUB).rstrip("/") == url else None


def read_secret(path: Path) -> str:
    """The secret that a file holds, without the line break at its end; raises BadData."""
    try:
        secret = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"{path}: {error}", hint="name a readable file with the secret alone in it") from error
    if not secret:
        raise BadData(f"{path}: is empty", hint="write the secret into it")
    return secret


def open_hub(flag: str | None) -> "HubClient":
    """A client for the hub that is meant."""
    from loractl.hub.client import HubClient

    url = hub_url(flag)
    return HubClient(url, hub_token(url))


def open_hub_admin(flag: str | None) -> "HubAdmin":
    """A client for what those who run a hub do with it."""
    from loractl.hub.admin_client import HubAdmin

    url = hub_url(flag)
    return HubAdmin(url, hub_token(url))


def adapter_cache() -> "AdapterCache":
    """This user's adapters on disk."""
    from loractl.adapters.base_identity import cache_folder
    from loractl.adapters.local_cache import AdapterCache

    return AdapterCache(cache_folder() / "adapters")


def adapter_folder(name: str, flag: str | None) -> Path:
    """Find an adapter that is named by its folder or by its reference in the hub, which is then fetched.

    Raises NotFound, NotAllowed or Unreachable.
    """
    if (Path(name) / "adapter_config.json").is_file():
        return Path(name)
    from loractl.adapters.reference import parse_reference

    ref = parse_reference(name)
    with open_hub(flag) as hub:
        return hub.fetch(hub.resolve(ref), adapter_cache())
