"""How commands reach a running server: which address is meant, and what an answer that is none says. Loads no model."""

from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import click

from loractl.adapters.errors import LoractlError, NotAllowed, NotFound, Unreachable

if TYPE_CHECKING:
    import httpx

DEFAULT_SERVER = "http://127.0.0.1:8800"

Command = TypeVar("Command", bound=Callable[..., Any])


def server_option(command: Command) -> Command:
    """Add `--server URL` to a command, as its argument `url`."""
    return click.option(
        "--server",
        "url",
        envvar="LORACTL_SERVER",
        default=DEFAULT_SERVER,
        show_default=True,
        metavar="URL",
        callback=_address,
    )(command)


def _address(context: click.Context, option: click.Parameter, value: str) -> str:
    """The address without a last slash; `HOST:PORT` is http, and OpenAI clients' `/v1` at the end is not part of it."""
    text = value.strip()
    url = (text if "://" in text else f"http://{text}").rstrip("/").removesuffix("/v1")
    try:
        parts = urlsplit(url)
        is_sound = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_sound = False
    if not is_sound:
        raise click.BadParameter(f"{value!r} is no address; write http://HOST:PORT", ctx=context, param=option)
    return url


def bearer(key: str | None) -> dict[str, str]:
    """The header that shows a key, if there is one."""
    return {"authorization": f"Bearer {key}"} if key else {}


def get_json(url: str, path: str, key: str | None) -> Any:
    """What the server answers to GET; raises Unreachable, NotAllowed, NotFound or LoractlError with its own reason."""
    import httpx

    try:
        response = httpx.get(url + path, headers=bearer(key), timeout=10.0)
    except httpx.HTTPError as error:
        raise Unreachable(f"no server answers at {url}", hint="start one with `loractl serve BASE`") from error
    if not response.is_success:
        raise refusal(url, response)
    try:
        return response.json()
    except ValueError as error:
        raise LoractlError(f"{url}{path}: the answer is no JSON", hint="is it a loractl server?") from error


def refusal(url: str, response: "httpx.Response") -> LoractlError:
    """The error that an answer tells, in the server's words where it has any."""
    message, hint = reason(response)
    if response.status_code in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        return NotAllowed(f"{url}: {message}", hint=hint or "give --key, or set LORACTL_API_KEY")
    if response.status_code == HTTPStatus.NOT_FOUND:
        return NotFound(f"{url}: {message}", hint=hint or "is it a loractl server?")
    if response.status_code == HTTPStatus.SERVICE_UNAVAILABLE:
        return Unreachable(f"{url}: {message}", hint=hint)
    return LoractlError(f"{url}: {message}", hint=hint or "is it a loractl server?")


def reason(response: "httpx.Response") -> tuple[str, str | None]:
    """Why a request was refused, and what may help; `HTTP 502` and the like where the answer is not of this API."""
    try:
        error = response.json()["error"]
        return str(error["message"]), error.get("hint")
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"HTTP {response.status_code}", None
