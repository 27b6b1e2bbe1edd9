"""Names of adapters: `team/name[@revision]`, and the digest that is an adapter's identity."""

import re
from dataclasses import dataclass
from typing import NewType

from loractl.adapters.errors import UsageError

Digest = NewType("Digest", str)
"""`sha256:` and 64 hex digits, made by `loractl.adapters.digest`; the key of every cache."""

DEFAULT_REVISION = "main"

# The rule of the Hugging Face client, which refuses anything else before it asks a hub.
_PART = re.compile(r"[A-Za-z0-9_.-]{1,96}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One adapter by name: a repo and the revision (version tag, channel or commit) that is meant."""

    namespace: str
    name: str
    revision: str = DEFAULT_REVISION

    @property
    def repo_id(self) -> str:
        return f"{self.namespace}/{self.name}"

    def __str__(self) -> str:
        return self.repo_id if self.revision == DEFAULT_REVISION else f"{self.repo_id}@{self.revision}"


def parse_reference(text: str) -> AdapterRef:
    """Read `team/name` or `team/name@revision`; raises UsageError with the rule that was broken."""
    repo_id, at, revision = text.partition("@")
    namespace, slash, name = repo_id.partition("/")
    if not slash or "/" in name:
        raise UsageError(f"not an adapter reference: {text!r}", hint="write TEAM/NAME or TEAM/NAME@REVISION")
    for part in (namespace, name):
        check_name_part(part, whole=text)
    if at:
        check_revision(revision, whole=text)
    return AdapterRef(namespace, name, revision if at else DEFAULT_REVISION)


def check_name_part(part: str, *, whole: str) -> None:
    """Raise UsageError unless `part` may be a team or adapter name."""
    broken = (
        not _PART.fullmatch(part)
        or part[0] in "-."
        or part[-1] in "-."
        or "--" in part
        or ".." in part
        or part.endswith(".git")
    )
    if broken:
        raise UsageError(
            f"{part!r} in {whole!r} is not a valid name",
            hint="1 to 96 of A-Z a-z 0-9 _ - . ; no '-' or '.' at either end, no '--', '..' or '.git'",
        )


def check_revision(revision: str, *, whole: str) -> None:
    """Raise UsageError unless `revision` may name a tag, a channel or a commit."""
    broken = (
        not _REVISION.fullmatch(revision)
        or ".." in revision
        or "//" in revision
        or revision.endswith(("/", ".", ".lock"))
    )
    if broken:
        raise UsageError(
            f"{revision!r} in {whole!r} is not a valid revision",
            hint="a version such as v3, a channel such as prod, or a commit id",
        )


def is_digest(text: str) -> bool:
    """Tell whether `text` has the form of a digest."""
    return _DIGEST.fullmatch(text) is not None
