"""What a validation says, and the limits and choices that an operator may set. No check."""

from typing import Literal

import msgspec

VALIDATOR_VERSION = "1"
"""Grows whenever a check changes its mind about some file; old records keep theirs."""

Level = Literal["reject", "warn", "info"]
Choice = Literal["reject", "warn", "off"]


class Finding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one check found in one place."""

    code: str
    level: Level
    message: str
    hint: str | None = None
    path: str | None = None


class ValidationRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on one tree of files."""

    validator_version: str = VALIDATOR_VERSION
    findings: tuple[Finding, ...] = ()
    digests: dict[str, str] = {}
    """Folder of each complete adapter ("" is the root) -> its digest."""
    not_checked: tuple[str, ...] = ()
    """Codes of checks that lacked what they compare with, such as E_BASE_SHAPE when the base is unknown."""

    @property
    def verdict(self) -> Literal["passed", "warned", "rejected"]:
        levels = {finding.level for finding in self.findings}
        return "rejected" if "reject" in levels else "warned" if "warn" in levels else "passed"

    @property
    def rejections(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.level == "reject")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.level == "warn")


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """Limits and choices of one hub; the defaults are the project's."""

    max_files: int = 1000
    max_file_bytes: int = 16 << 30
    max_tree_bytes: int = 64 << 30
    min_weights_bytes: int = 1024
    """A weights file below this is what a sharded model leaves when it was saved without gathering."""
    max_rank: int = 64
    """Above it servers of this kind will not take the adapter."""
    base_pin: Choice = "warn"
    """What a push without a pinned base meets."""
    local_path: Choice = "reject"
    tokenizer_files: Choice = "warn"
    """Templates and tokenizers beside an adapter: a server takes them from the base alone."""
