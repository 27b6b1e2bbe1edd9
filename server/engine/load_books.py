"""What became of adapters' loads: how long each took, and which failed and are not tried again yet. Knows no slots."""

import time
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loractl.adapters.errors import AdapterInvalid, Incompatible, LoractlError, Unsupported
from loractl.adapters.reference import Digest
from loractl.server.engine.stats import LoadFault, LoadRecord

_FIRST_BACK_OFF_S, _LONGEST_BACK_OFF_S = 0.5, 30.0
_MAX_FAILURES_KEPT = 1024
_QUARANTINE_S = 300.0
"""How long an adapter that could not be loaded is told of, unless a later try succeeds."""


class LoadTimes:
    """The seconds of each load, stage by stage; a load that was given up leaves nothing behind."""

    def __init__(self) -> None:
        self._read_s: dict[Digest, float] = {}
        self._copy_began: dict[Digest, float] = {}
        self._records: list[LoadRecord] = []

    def was_read(self, digest: Digest, seconds: float) -> None:
        self._read_s[digest] = seconds

    def copy_begins(self, digest: Digest) -> None:
        self._copy_began[digest] = time.monotonic()

    def has_arrived(self, digest: Digest) -> None:
        """Book a load at its end; later calls for the same load change nothing."""
        began = self._copy_began.pop(digest, None)
        if began is not None:
            read_s = self._read_s.pop(digest, None)
            self._records.append(LoadRecord(read_s=read_s, copy_s=time.monotonic() - began))

    def failed(self, fault: LoadFault) -> None:
        self._records.append(LoadRecord(fault=fault))

    def forget(self, digest: Digest) -> None:
        self._read_s.pop(digest, None)
        self._copy_began.pop(digest, None)

    def take(self) -> tuple[LoadRecord, ...]:
        """The loads that ended since the last call."""
        records, self._records = tuple(self._records), []
        return records


@dataclass(slots=True)
class _Failure:
    """A load that failed: its error is the answer to whoever asks until it is tried again."""

    error: LoractlError
    fault: LoadFault
    failed_at: float
    back_off_s: float


class LoadFailures:
    """Adapters that could not be loaded; each is tried again after a time that doubles."""

    def __init__(self) -> None:
        self._failures: OrderedDict[Digest, _Failure] = OrderedDict()

    def note(self, digest: Digest, error: BaseException) -> LoadFault:
        """Keep a load's error for those who ask next, and tell what kind it is."""
        fault = _fault(error)
        if not isinstance(error, LoractlError):
            error = AdapterInvalid(f"adapter {digest[:19]} could not be read: {error}", field="model")
        error.field = error.field or "model"
        before = self._failures.pop(digest, None)
        back_off_s = _FIRST_BACK_OFF_S if before is None else min(2 * before.back_off_s, _LONGEST_BACK_OFF_S)
        self._failures[digest] = _Failure(error, fault, time.monotonic(), back_off_s)
        if len(self._failures) > _MAX_FAILURES_KEPT:
            self._failures.popitem(last=False)
        return fault

    def recent(self, digest: Digest) -> LoractlError | None:
        """The error of a load that is not to be tried again yet."""
        failure = self._failures.get(digest)
        if failure is None or time.monotonic() >= failure.failed_at + failure.back_off_s:
            return None
        return failure.error

    def forget(self, digest: Digest) -> None:
        self._failures.pop(digest, None)

    def quarantined(self) -> Mapping[LoadFault, int]:
        """Adapters that could not be loaded within the last minutes, by why."""
        if not self._failures:
            return {}
        since = time.monotonic() - _QUARANTINE_S
        return Counter(failure.fault for failure in self._failures.values() if failure.failed_at > since)


def _fault(error: BaseException) -> LoadFault:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "oom"
    if isinstance(error, OSError):
        return "disk"
    if isinstance(error, Unsupported):
        return "unsupported"
    return "base" if isinstance(error, Incompatible) else "invalid"
