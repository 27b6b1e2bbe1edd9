"""From what a hub answered, or did not, to the project's own errors. Sends nothing."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import msgspec

from loractl.adapters.errors import (
    AdapterInvalid,
    BadRequest,
    Conflict,
    EntryNotFound,
    LoractlError,
    NotAllowed,
    NotFound,
    Overloaded,
    RepoNotFound,
    RevisionNotFound,
    Unauthenticated,
    Unreachable,
    WillNotFit,
)
from loractl.hub.wire import ErrorBody

_BY_STATUS: dict[int, type[LoractlError]] = {
    400: BadRequest,
    401: Unauthenticated,
    403: NotAllowed,
    404: NotFound,
    409: Conflict,
    412: Conflict,
    413: WillNotFit,
    429: Overloaded,
}
_BY_HF_CODE: dict[str, type[LoractlError]] = {
    "RepoNotFound": RepoNotFound,
    "RevisionNotFound": RevisionNotFound,
    "EntryNotFound": EntryNotFound,
    "GatedRepo": NotAllowed,
}


def _classes(root: type[LoractlError]) -> Iterator[type[LoractlError]]:
    yield root
    for child in root.__subclasses__():
        yield from _classes(child)


def error_of_response(
    status: int, headers: Mapping[str, str], content: bytes, *, place: str, about: str = ""
) -> LoractlError:
    """Build the error that a hub's answer means; `about` is the adapter that was asked for."""
    body = _body(content)
    known = {cls.code: cls for cls in _classes(LoractlError)}
    cls = known.get(body.code) if body is not None else None
    if cls is None or cls.__init__ is not LoractlError.__init__:
        cls = AdapterInvalid if body is not None and body.code in known else None
    hf_code = headers.get("X-Error-Code", "")
    cls = cls or _BY_HF_CODE.get(hf_code) or _BY_STATUS.get(status) or (Unreachable if status >= 500 else BadRequest)
    fallback = headers.get("X-Error-Message") or f"the hub at {place} answered {status}"
    message = body.error if body is not None and body.error else f"{about}: {fallback}" if about else fallback
    hint = body.hint if body is not None else None
    if hint:
        # On the Hugging Face routes the hint rides in the text too, for clients that print nothing else.
        message = message.removesuffix(f" ({hint})")
    return cls(message, hint=hint or _hint(cls), field=body.field if body is not None else None)


def is_own_error(content: bytes) -> bool:
    """Tell whether an answer comes from a hub of this project, which always says its own code."""
    body = _body(content)
    return body is not None and bool(body.code)


def _body(content: bytes) -> ErrorBody | None:
    try:
        return msgspec.json.decode(content, type=ErrorBody)
    except msgspec.DecodeError:
        return None


def _hint(cls: type[LoractlError]) -> str | None:
    if issubclass(cls, NotAllowed):
        return "set LORACTL_TOKEN to a token with this right; `loractl hub token create` makes one"
    if issubclass(cls, RepoNotFound):
        return "`loractl list` shows what you may see; a private adapter looks the same without its token"
    return None


def unreachable(place: str, cause: BaseException | None = None) -> Unreachable:
    """The error for a hub that gives no answer."""
    reason = f": {type(cause).__name__}" if cause is not None else ""
    return Unreachable(
        f"no answer from the hub at {place}{reason}",
        hint="start one with `loractl hub serve`, or name another with --hub or LORACTL_HUB",
    )


@contextlib.contextmanager
def translated(place: str, *, about: str) -> Iterator[None]:
    """Turn what huggingface_hub raises inside into the project's errors."""
    from huggingface_hub import errors as hf

    try:
        yield
    except hf.HfHubHTTPError as error:
        response: Any = error.response
        content = _content(response)
        raise error_of_response(response.status_code, response.headers, content, place=place, about=about) from error
    except hf.LocalEntryNotFoundError as error:
        # What the download calls make of every failure to reach the hub.
        cause = error.__cause__
        if isinstance(cause, hf.HfHubHTTPError):
            answer: Any = cause.response
            raise error_of_response(
                answer.status_code, answer.headers, _content(answer), place=place, about=about
            ) from error
        raise unreachable(place, cause) from error
    except hf.HFValidationError as error:
        raise BadRequest(str(error)) from error
    except ValueError as error:
        # How huggingface_hub tells that the hub refuses a file before its bytes are sent, in the hub's words alone.
        _, is_refusal, words = str(error).partition("LFS batch API returned errors:")
        if not is_refusal:
            raise
        raise WillNotFit(words.partition("`")[2].strip("` \n") or words.strip()) from error
    except (httpx.HTTPError, _hf_transport_error(), ConnectionError, TimeoutError, hf.FileMetadataError) as error:
        raise unreachable(place, error) from error


def _hf_transport_error() -> type[Exception]:
    """The base of huggingface_hub's HTTP library's errors; which library that is changes between releases."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(cls for cls in HfHubHTTPError.__mro__ if cls.__name__ == "HTTPError" and issubclass(cls, Exception))


def _content(response: Any) -> bytes:
    try:
        return bytes(response.content)
    except RuntimeError:
        return b""  # a streamed answer that was never read
