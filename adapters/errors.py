"""The one tree of errors: every failure that a person can cause or meet has a class here.

    class                             code                   status  exit
    LoractlError                      INTERNAL                  500     1
    ├── UsageError                    USAGE                     400     2   a command or request that cannot be meant
    │   └── BadRequest                BAD_REQUEST               400     2   one field of a request is wrong
    │       └── ContextExceeded       CONTEXT_LENGTH_EXCEEDED   400     2   prompt and output beyond the model's window
    ├── BadData                       BAD_DATA                  400     3   a file's content is wrong
    │   ├── BadRow                    BAD_ROW                   400     3   one row of a training file
    │   ├── BadRecipe                 BAD_RECIPE                400     3   a recipe key or value
    │   └── AdapterInvalid            ADAPTER_INVALID           400     3   an adapter that fails its checks
    │       └── CheckFailed           CHECK_FAILED              400     3   one named check, such as E_ST_HEADER
    ├── WillNotFit                    WILL_NOT_FIT              413     4   memory, disk, quota or a size limit
    ├── Incompatible                  INCOMPATIBLE              422     5   two things that do not belong together
    │   ├── TargetsMissing            TARGETS_MISSING           422     5   the base lacks the named modules
    │   ├── BaseMismatch              BASE_MISMATCH             422     5   an adapter of another base
    │   └── Unsupported               UNSUPPORTED               422     5   a feature that this side does not serve
    ├── Conflict                      CONFLICT                  409     5   somebody else changed it first
    │   └── ParentMoved               PARENT_MOVED              412     5   a commit on a head that is no longer there
    ├── Diverged                      DIVERGED                  500     6   training left the finite numbers
    ├── Interrupted                   INTERRUPTED               500   130   a run was asked to stop, and saved its state
    ├── NotFound                      NOT_FOUND                 404     7
    │   ├── RepoNotFound              REPO_NOT_FOUND            404     7   also: private, and not yours
    │   ├── RevisionNotFound          REVISION_NOT_FOUND        404     7
    │   ├── EntryNotFound             ENTRY_NOT_FOUND           404     7   a file inside a revision
    │   └── EventsGone                EVENTS_GONE               410     7   events older than a hub keeps: look afresh
    ├── NotAllowed                    NOT_ALLOWED               403     8
    │   └── Unauthenticated           UNAUTHENTICATED           401     8
    ├── Unreachable                   UNREACHABLE               503     9   a service does not answer
    │   └── Draining                  DRAINING                  503     9
    ├── Overloaded                    OVERLOADED                429     9   try again after `retry_after_s`
    │   ├── RateLimited               RATE_LIMITED              429     9   a quota of the caller's is used up
    │   └── DeadlinePassed            DEADLINE_PASSED           429     9   a request waited longer than it may
    ├── BlobMissing                   BLOB_MISSING              500     1   a hub's store lost bytes that it promised
    ├── BlobCorrupt                   BLOB_CORRUPT              500     1   a hub's store holds other bytes than pushed
    └── EngineFailure                 ENGINE_FAILURE            500     1   a step failed for this request

Each carries `message` (place and cause), `hint` (the fix) and, where a request field is at fault, `field`.
"""

from typing import ClassVar


class LoractlError(Exception):
    """Base of all errors that are shown to a person; `status` is HTTP's, `exit_code` the command's."""

    code: ClassVar[str] = "INTERNAL"
    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(
        self, message: str, *, hint: str | None = None, field: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.field = field
        self.retry_after_s = retry_after_s


class UsageError(LoractlError):
    code = "USAGE"
    status = 400
    exit_code = 2


class BadRequest(UsageError):
    code = "BAD_REQUEST"


class ContextExceeded(BadRequest):
    code = "CONTEXT_LENGTH_EXCEEDED"


class BadData(LoractlError):
    code = "BAD_DATA"
    status = 400
    exit_code = 3


class BadRow(BadData):
    code = "BAD_ROW"


class BadRecipe(BadData):
    code = "BAD_RECIPE"


class AdapterInvalid(BadData):
    code = "ADAPTER_INVALID"


class CheckFailed(AdapterInvalid):
    """One check of an adapter's files failed; `check` is its code in the validation record."""

    code = "CHECK_FAILED"

    def __init__(self, message: str, *, check: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.check = check


class WillNotFit(LoractlError):
    code = "WILL_NOT_FIT"
    status = 413
    exit_code = 4


class Incompatible(LoractlError):
    code = "INCOMPATIBLE"
    status = 422
    exit_code = 5


class TargetsMissing(Incompatible):
    code = "TARGETS_MISSING"


class BaseMismatch(Incompatible):
    code = "BASE_MISMATCH"


class Unsupported(Incompatible):
    code = "UNSUPPORTED"


class Conflict(LoractlError):
    code = "CONFLICT"
    status = 409
    exit_code = 5


class ParentMoved(Conflict):
    code = "PARENT_MOVED"
    status = 412


class Diverged(LoractlError):
    code = "DIVERGED"
    exit_code = 6


class Interrupted(LoractlError):
    code = "INTERRUPTED"
    exit_code = 130


class NotFound(LoractlError):
    code = "NOT_FOUND"
    status = 404
    exit_code = 7


class RepoNotFound(NotFound):
    code = "REPO_NOT_FOUND"


class RevisionNotFound(NotFound):
    code = "REVISION_NOT_FOUND"


class EntryNotFound(NotFound):
    code = "ENTRY_NOT_FOUND"


class EventsGone(NotFound):
    code = "EVENTS_GONE"
    status = 410


class NotAllowed(LoractlError):
    code = "NOT_ALLOWED"
    status = 403
    exit_code = 8


class Unauthenticated(NotAllowed):
    code = "UNAUTHENTICATED"
    status = 401


class Unreachable(LoractlError):
    code = "UNREACHABLE"
    status = 503
    exit_code = 9


class Draining(Unreachable):
    code = "DRAINING"


class Overloaded(LoractlError):
    code = "OVERLOADED"
    status = 429
    exit_code = 9


class RateLimited(Overloaded):
    code = "RATE_LIMITED"


class DeadlinePassed(Overloaded):
    code = "DEADLINE_PASSED"


class BlobMissing(LoractlError):
    code = "BLOB_MISSING"


class BlobCorrupt(LoractlError):
    code = "BLOB_CORRUPT"


class EngineFailure(LoractlError):
    code = "ENGINE_FAILURE"
