"""One hub over HTTP: bounded retries, typed answers, the project's errors. Knows no adapter and no huggingface_hub."""

import time
from typing import Any, Self, TypeVar

import httpx
import msgspec

from loractl.adapters.errors import LoractlError, NotFound, RepoNotFound, Unsupported
from loractl.hub import client_errors
from loractl.hub.wire import API_PREFIX

DEFAULT_HUB = "http://127.0.0.1:8700"
_CONNECT_TIMEOUT_S = 3.0
_RETRY_STATUS = {429, 502, 503, 504}
_MAX_RETRY_WAIT_S = 5.0

T = TypeVar("T")


class HubTransport:
    """Talks to one hub as one person; safe to share between threads. Close it, or use it in a `with`."""

    def __init__(
        self, endpoint: str = DEFAULT_HUB, token: str | None = None, *, timeout_s: float = 30.0, num_attempts: int = 3
    ) -> None:
        self.endpoint = endpoint.rstrip("/")
        self._token = token
        self._num_attempts = num_attempts
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(
            base_url=self.endpoint,
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=min(_CONNECT_TIMEOUT_S, timeout_s)),
            follow_redirects=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _get(self, path: str, kind: type[T], *, params: dict[str, Any] | None = None, about: str = "") -> T:
        return self._own(self._send("GET", API_PREFIX + path, params=params), kind, about=about)

    def _post(self, path: str, body: msgspec.Struct, kind: type[T], *, about: str = "") -> T:
        content = msgspec.json.encode(body)
        return self._own(self._send("POST", API_PREFIX + path, content=content), kind, about=about)

    def _put(self, path: str, body: msgspec.Struct, kind: type[T], *, about: str = "") -> T:
        return self._own(self._send("PUT", API_PREFIX + path, content=msgspec.json.encode(body)), kind, about=about)

    def _own(self, response: httpx.Response, kind: type[T], *, about: str) -> T:
        if response.is_success:
            return self._decode(response, kind)
        if response.status_code in {404, 405, 501} and not client_errors.is_own_error(response.content):
            raise Unsupported(
                f"the hub at {self.endpoint} has no channels, versions and records: it is not a loractl hub",
                hint="push and pull work with it; for this command run `loractl hub serve`",
            )
        raise self._error(response, about=about)

    def _decode(self, response: httpx.Response, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(response.content, type=kind)
        except msgspec.DecodeError as error:
            raise Unsupported(
                f"the hub at {self.endpoint} gave an answer that this loractl does not understand: {error}",
                hint="bring hub and client to the same version",
            ) from error

    def _error(self, response: httpx.Response, *, about: str) -> LoractlError:
        error = client_errors.error_of_response(
            response.status_code, response.headers, response.content, place=self.endpoint, about=about
        )
        if type(error) is NotFound and about:
            return RepoNotFound(error.message, hint=error.hint)
        return error

    def _send(
        self, method: str, path: str, *, params: dict[str, Any] | None = None, content: bytes | None = None
    ) -> httpx.Response:
        """Send with bounded retries: reads on any trouble, writes only when they cannot have arrived."""
        headers = {"content-type": "application/json"} if content is not None else {}
        for attempt in range(1, self._num_attempts + 1):
            last = attempt == self._num_attempts
            wait_s = min(0.2 * 2**attempt, _MAX_RETRY_WAIT_S)
            try:
                response = self._http.request(method, path, params=params, content=content, headers=headers)
            except httpx.TransportError as error:
                if last or not (method == "GET" or isinstance(error, httpx.ConnectError)):
                    raise client_errors.unreachable(self.endpoint, error) from error
            else:
                if last or method != "GET" or response.status_code not in _RETRY_STATUS:
                    return response
                wait_s = _retry_after_s(response) or wait_s
            time.sleep(wait_s)
        raise client_errors.unreachable(self.endpoint)


def _retry_after_s(response: httpx.Response) -> float | None:
    try:
        return min(float(response.headers["Retry-After"]), _MAX_RETRY_WAIT_S)
    except (KeyError, ValueError):
        return None
