"""The client's answers when a hub misbehaves: typed, bounded in time, never a token to the wrong place."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from loractl.adapters.errors import (
    Conflict,
    LoractlError,
    NotAllowed,
    RepoNotFound,
    RevisionNotFound,
    Unreachable,
    Unsupported,
)
from loractl.adapters.reference import parse_reference
from loractl.hub.client import HubClient

Answer = tuple[int, dict[str, str], Any]
REF = parse_reference("demo/movies@prod")
RESOLVED = {
    "repo_id": "demo/movies",
    "revision": "prod",
    "commit": "a" * 40,
    "digest": "sha256:" + "b" * 64,
    "version": "v3",
    "base_id": None,
    "base_fingerprint": None,
    "rank": 8,
    "size_bytes": 10,
    "adapter_size_bytes": 9,
}


@pytest.fixture
def stub() -> Iterator[Callable[..., str]]:
    """Start a hub that gives the named answers in order, the last one for ever."""
    servers: list[ThreadingHTTPServer] = []

    def start(*answers: Answer) -> str:
        left = list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, headers, body = left.pop(0) if len(left) > 1 else left[0]
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(data))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            do_POST = do_GET  # noqa: N815  the library names it

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                del format, args

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_resolve_reads_the_hubs_answer(stub: Callable[..., str]) -> None:
    with HubClient(stub((200, {}, RESOLVED))) as hub:
        found = hub.resolve(REF)
    assert (found.version, found.digest) == ("v3", RESOLVED["digest"])


def test_resolve_is_retried_when_the_hub_is_busy(stub: Callable[..., str]) -> None:
    with HubClient(stub((503, {"Retry-After": "0.01"}, b""), (200, {}, RESOLVED))) as hub:
        assert hub.resolve(REF).version == "v3"


def test_commit_without_an_adapter_is_not_a_revision(stub: Callable[..., str]) -> None:
    with HubClient(stub((200, {}, RESOLVED | {"digest": None}))) as hub, pytest.raises(RevisionNotFound):
        hub.resolve(REF)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "REPO_NOT_FOUND", RepoNotFound),
        (404, "REVISION_NOT_FOUND", RevisionNotFound),
        (403, "NOT_ALLOWED", NotAllowed),
        (409, "CONFLICT", Conflict),
    ],
)
def test_error_of_the_hub_keeps_its_kind_and_words(
    stub: Callable[..., str], status: int, code: str, kind: type[LoractlError]
) -> None:
    url = stub((status, {}, {"error": "as the hub says", "code": code, "hint": "do this"}))
    with HubClient(url) as hub, pytest.raises(kind, match="as the hub says") as caught:
        hub.promote(REF, "prod", expected_old="a" * 40)
    assert type(caught.value) is kind
    assert caught.value.hint == "do this"


def test_other_hubs_lack_channels_and_say_so(stub: Callable[..., str]) -> None:
    with HubClient(stub((404, {}, b"<html>"))) as hub, pytest.raises(Unsupported, match="not a loractl hub"):
        hub.history(REF)


def test_answer_of_another_shape_is_unsupported(stub: Callable[..., str]) -> None:
    with HubClient(stub((200, {}, {"nothing": 1}))) as hub, pytest.raises(Unsupported):
        hub.resolve(REF)


def test_silent_hub_is_unreachable_with_a_hint() -> None:
    with HubClient("http://127.0.0.1:9", num_attempts=2) as hub, pytest.raises(Unreachable) as caught:
        hub.resolve(REF)
    assert "loractl hub serve" in (caught.value.hint or "")
