"""Every setting of the hub in one list, read from `LORACTL_HUB_*` and the command line. Starts nothing."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from loractl.adapters.errors import UsageError

ENV_PREFIX = "LORACTL_HUB_"
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})

_MIB = 1 << 20
_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSettings:
    """What an operator may set; `LORACTL_HUB_<FIELD IN CAPITALS>` in the environment, same meaning everywhere.

    `LORACTL_HUB_<FIELD>_FILE` names a file that holds the value.
    """

    root: Path = Path("loractl-hub")
    """Folder of the database, the blobs and the staging area."""
    host: str = "127.0.0.1"
    port: int = 8700
    database_url: str | None = None
    """`postgresql://user:password@host/name`; None: SQLite in `root`."""
    blobs: str | None = None
    """`s3://bucket/prefix` (credentials from the usual `AWS_*` variables); None: files in `root`."""
    s3_timeout_s: float = 20.0
    """Of one request to the S3 store, at least 0.1; one that fails sooner is tried again for as long in all."""
    public_url: str | None = None
    """The address that clients use, when a proxy hides it; None: taken from each request's `Host`."""
    anonymous_read: bool = False
    """Let requests without a token read public repos."""
    max_file_bytes: int = 8 * _GIB
    max_regular_bytes: int = 1 * _MIB
    """Larger files, and all weights, travel outside the commit's body."""
    max_commit_bytes: int = 64 * _MIB
    """Of the body of a commit: its small files in base64."""
    max_files_per_repo: int = 1000
    max_files_per_request: int = 256
    """Of a preupload or an LFS batch, as the Hugging Face client sends them."""
    namespace_quota_bytes: int = 0
    """For every namespace that has no quota of its own; 0: none."""
    namespace_quota_repos: int = 0
    """Likewise, of repos."""
    free_bytes_reserve: int = 64 * _MIB
    """Uploads are refused when they would leave less than this on the disk, so that deletes still work."""
    multipart_threshold_bytes: int = 512 * _MIB
    multipart_chunk_bytes: int = 64 * _MIB
    upload_ttl_s: float = 24 * 3600.0
    """How long an upload may take before its address expires and its parts are swept."""
    body_timeout_s: float = 60.0
    """A request whose body stalls for longer is cut."""
    gc_grace_s: float = 24 * 3600.0
    """A blob that nothing names is kept this long after it was last touched."""
    gc_every_s: float = 24 * 3600.0
    """A running hub runs gc by itself this often; 0: never."""
    webhook_private_addresses: bool = False
    """Let webhooks send to addresses of this machine and its network too."""
    webhook_attempts: int = 8
    webhook_retry_s: float = 5.0
    """After the first failure; four times as long after each further one."""
    event_keep_days: float = 30.0
    """Events older than this are taken away; who follows from before looks at everything afresh."""
    event_heartbeat_s: float = 5.0
    """How often a stream of events shows that it lives."""
    max_event_streams: int = 1000
    """Open streams of events of one process."""
    log_level: str = "info"

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK_HOSTS


def read_settings(environment: Mapping[str, str] | None = None, **overrides: Any) -> HubSettings:
    """Build settings from the environment and overrides that are not None; raises UsageError naming the variable."""
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    for field in fields(HubSettings):
        name = ENV_PREFIX + field.name.upper()
        text = _read(environment, name)
        if text is not None:
            values[field.name] = _parse(text, type(getattr(_DEFAULTS, field.name)), name=name)
    values |= {name: value for name, value in overrides.items() if value is not None}
    return HubSettings(**values)


def _read(environment: Mapping[str, str], name: str) -> str | None:
    """The variable, or the content of the file that `<name>_FILE` names, so that a secret need not be a variable."""
    file = environment.get(f"{name}_FILE")
    if file is None:
        return environment.get(name)
    if name in environment:
        raise UsageError(f"{name} and {name}_FILE are both set", hint="keep one")
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{name}_FILE={file}: {error}", hint="name a readable text file") from error


def _parse(text: str, kind: type, *, name: str) -> object:
    try:
        if kind is bool:
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
        if kind in {int, float}:
            number = kind(text)
            if not 0 <= number < math.inf:
                raise UsageError(f"{name}={text!r} is not a size, count or time: those are 0 or more")
            return number
        if issubclass(kind, Path):
            return Path(text)
    except (KeyError, ValueError) as error:
        raise UsageError(f"{name}={text!r} is not a {kind.__name__}") from error
    return text


_DEFAULTS = HubSettings()
