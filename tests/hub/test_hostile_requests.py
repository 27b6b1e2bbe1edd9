"""Strangers' requests: bodies that lie or never end, paths that lead elsewhere; each is refused, the hub goes on.

What the stock client could send by itself is in `tests/conformance`; here are the bytes that it never would.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest

from live_hub import LiveHub, live_hub
from loractl.hub.app import create_app
from loractl.hub.settings import HubSettings

_COMMIT = "/api/models/team/name/commit/main"
_HEADER = '{"key":"header","value":{"summary":"x"}}'
_SECRET = b"nobody may read this"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveHub]:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "secret.txt").write_bytes(_SECRET)
    with live_hub(folder / "hub", max_regular_bytes=10_000, body_timeout_s=0.3) as running:
        running.api().create_repo("team/name")
        with running.http() as http:
            _commit(http, _file("a.txt", b"hello")).raise_for_status()
        yield running


def _file(path: str, data: bytes) -> str:
    value = {"path": path, "content": base64.b64encode(data).decode(), "encoding": "base64"}
    return json.dumps({"key": "file", "value": value})


def _commit(http: httpx.Client, *lines: str, **headers: str) -> httpx.Response:
    return http.post(_COMMIT, content="\n".join((_HEADER, *lines)), headers=headers)


def _state(http: httpx.Client) -> tuple[Any, Any]:
    return http.get("/api/models/team/name/commits/main").json(), http.get("/api/models/team/name/tree/main").json()


_ELSEWHERE = [
    *("../x.txt", "..", "/etc/passwd", "a/../../x", "a\\..\\b.txt", ".git/config", "a\x00b", "a\nb", "C:\\x", "./x"),
    "\ud800",
]
_HELLO = hashlib.sha256(b"hello").hexdigest()


@pytest.mark.parametrize("path", _ELSEWHERE, ids=ascii)
@pytest.mark.parametrize("operation", ["file", "lfsFile", "deletedFile", "deletedFolder"])
def test_no_operation_takes_a_path_that_leads_elsewhere(hub: LiveHub, operation: str, path: str) -> None:
    value = {"path": path, "content": "aGVsbG8=", "encoding": "base64", "algo": "sha256", "oid": _HELLO, "size": 5}
    with hub.http() as http:
        before = _state(http)
        answer = _commit(http, json.dumps({"key": operation, "value": value}))
        assert answer.status_code in {400, 404}, answer.text
        assert answer.json()["error"]
        assert _state(http) == before


_WRONG_BODIES = {
    "two keys of one name": '{"key":"file","key":"header","value":{"summary":"y"}}',
    "header last": _file("b.txt", b"x") + "\n" + _HEADER,
    "value of nothing": '{"key":"file","value":null}',
    "number without end": '{"key":"lfsFile","value":{"path":"b","oid":"0","size":' + "9" * 5000 + "}}",
    "size as float": '{"key":"lfsFile","value":{"path":"b","oid":"0","size":1e400}}',
    "half a surrogate": '{"key":"file","value":{"path":"\\ud800","content":"aGk="}}',
    "content as list": '{"key":"file","value":{"path":"b.txt","content":["aGk="]}}',
    "content with spaces": '{"key":"file","value":{"path":"b.txt","content":"aG k="}}',
    "content without its end": '{"key":"file","value":{"path":"b.txt","content":"aGk"}}',
    "parent of another kind": '{"key":"header","value":{"parentCommit":["x"]}}',
    "two objects in a line": '{"key":"deletedFile","value":{"path":"a.txt"}}{"key":"x","value":1}',
    "byte order mark": "\ufeff" + _file("b.txt", b"x"),
    "nested a million deep": '{"key":"file","value":' + "[" * 1_000_000 + "\n",
}


@pytest.mark.parametrize("name", _WRONG_BODIES)
def test_lines_that_are_no_commit_change_nothing(hub: LiveHub, name: str) -> None:
    with hub.http() as http:
        before = _state(http)
        answer = _commit(http, _WRONG_BODIES[name])
        assert answer.status_code in {400, 413}, answer.text
        assert len(answer.text) < 2000
        assert _state(http) == before


def test_bytes_that_are_no_text_change_nothing(hub: LiveHub) -> None:
    with hub.http() as http:
        before = _state(http)
        for body in (
            b"\xff\xfe" * 50,
            b"\x00" * 1000,
            b"\x1f\x8b\x08\x00" + b"x" * 50,
            b"\n" * 5000,
            _HEADER.encode() * 2,
        ):
            assert http.post(_COMMIT, content=body).status_code == 400
        assert _commit(http, _file("z.txt", b"x"), **{"content-encoding": "gzip"}).status_code in {200, 400, 415}
        assert http.post(_COMMIT, content=b" " * (20_000_000)).status_code == 413
        assert _state(http)[1][0] == before[1][0]


def test_repeated_field_of_a_line_means_one_thing(hub: LiveHub) -> None:
    """What is checked is what is kept: the path that a line names twice is judged and stored as the same one."""
    with hub.http() as http:
        line = '{"key":"file","value":{"path":"fine.txt","path":"../x.txt","content":"aGk="}}'
        assert _commit(http, line).status_code == 400
        line = '{"key":"file","value":{"path":"../x.txt","path":"fine.txt","content":"aGk="}}'
        assert _commit(http, line).status_code == 200
        assert http.get("/team/name/resolve/main/fine.txt").text == "hi"


@pytest.mark.parametrize(
    ("length", "sent"),
    [
        ("100000", _HEADER),
        (str(len(_HEADER) + 10), _HEADER + "\n"),
        ("-5", _HEADER),
        ("5x", _HEADER),
        ("99999999999999999999", _HEADER),
        (None, "ffffffff\r\n" + _HEADER),
        (None, "zz\r\n" + _HEADER),
    ],
    ids=["cut", "cut after a line", "negative", "no number", "huge", "chunk cut", "chunk without size"],
)
def test_body_that_is_not_what_was_announced_changes_nothing(hub: LiveHub, length: str | None, sent: str) -> None:
    address = urlsplit(hub.url)
    assert address.hostname is not None
    framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    head = f"POST {_COMMIT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {hub.admin}\r\n{framing}\r\n\r\n"
    with hub.http() as http:
        before = _state(http)
        with socket.create_connection((address.hostname, address.port or 80), timeout=20.0) as raw:
            raw.sendall((head + sent).encode())
            answer = b""
            with contextlib.suppress(ConnectionError):
                while piece := raw.recv(1 << 16):
                    answer += piece
                    if answer.endswith(b"}"):
                        break
        assert re.match(rb"HTTP/1\.1 4\d\d ", answer) or answer == b"", answer
        assert _state(http) == before


def _routes() -> list[tuple[str, str]]:
    found = set[tuple[str, str]]()
    for route in create_app(HubSettings(root=Path("nowhere"))).routes:
        for handler in getattr(route, "route_handlers", []):
            found |= {(method, route.path) for method in set(handler.http_methods) - {"HEAD", "OPTIONS"}}
    return sorted(found)


_CLIMBS = [
    *("../../secret.txt", "..%2f..%2fsecret.txt", "%2e%2e/%2e%2e/secret.txt", "..%252f..%252fsecret.txt"),
    *("..%5c..%5csecret.txt", "%c0%ae%c0%ae/secret.txt", "%00", "%ff%fe", "a%0d%0aset-cookie:%20x=1", "/etc/passwd"),
]


@pytest.mark.parametrize("climb", _CLIMBS)
def test_no_route_climbs_out_of_the_hub(hub: LiveHub, climb: str) -> None:
    """Each parameter of each route in turn, as the bytes stand: no client cleans the path first."""
    filled = {
        "namespace": "team",
        "name": "name",
        "revision": "main",
        "branch": "main",
        "path": "/a.txt",
        "number": "1",
    }
    address = urlsplit(hub.url)
    num_asked = 0
    for method, path in _routes():
        parts = re.findall(r"\{(\w+):(\w+)\}", path)
        if path.endswith("/events"):
            continue
        for aimed, _ in parts:
            whole = path
            for name, kind in parts:
                value = climb if name == aimed else filled.get(name, "1" if kind == "int" else "x")
                whole = whole.replace(f"/{{{name}:{kind}}}", "/" + value.lstrip("/") if name != aimed else "/" + value)
            answer = _raw(address.hostname or "", address.port or 80, method, whole, hub.admin)
            num_asked += 1
            assert re.match(rb"HTTP/1\.1 [234]\d\d ", answer) or b" 501 " in answer[:40], (method, whole, answer[:300])
            assert _SECRET not in answer
            assert b"root:" not in answer
            assert b"\nset-cookie: x=1" not in answer.lower()
    assert num_asked > 80


def _raw(host: str, port: int, method: str, path: str, token: str) -> bytes:
    body = "[]" if method != "GET" else ""
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\nconnection: close\r\n"
    with socket.create_connection((host, port), timeout=20.0) as raw:
        raw.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        answer = b""
        while piece := raw.recv(1 << 16):
            answer += piece
        return answer


def test_reason_with_control_characters_reaches_stock_clients_in_one_line(hub: LiveHub) -> None:
    with hub.http() as http:
        reason = "bad\x00\x07\x1b[31m\x7f\x85 data\r\nset-cookie: x=1 ü 漢"
        made = http.post("/api/loractl/v1/adapters/team/name/yank", json={"revision": "main", "reason": reason})
        assert made.status_code == 200, made.text
        answer = http.get("/team/name/resolve/main/a.txt")
        assert answer.status_code == 200
        warning = answer.headers["x-hf-warning"]
        assert not re.search(r"[\x00-\x1f\x7f-\x9f]", warning)
        assert "data  set-cookie: x=1 ü ?" in warning
        assert "set-cookie" not in answer.headers


def test_finding_with_control_characters_does_not_break_the_answer(hub: LiveHub) -> None:
    """A key of a config is text of the pusher's own choice, and the finding that warns of it repeats it."""
    config = json.dumps(_CONFIG | {"odd\x00\x1b[31m\x85key": 1})
    with hub.http() as http:
        http.post("/api/repos/create", json={"name": "odd", "organization": "team"}).raise_for_status()
        lines = [_HEADER, _file("notes/adapter_config.json", config.encode())]
        answer = http.post("/api/models/team/odd/commit/main", content="\n".join(lines))
        assert answer.status_code in {200, 400}, answer.text
        for header in ("x-hf-warning", "x-error-message"):
            assert not re.search(r"[\x00-\x1f\x7f-\x9f]", answer.headers.get(header, ""))
        assert {"x-hf-warning", "x-error-message"} & set(answer.headers)


_CONFIG: dict[str, Any] = {"peft_type": "IA3", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base"}


def test_quoted_names_are_the_same_as_plain_ones(hub: LiveHub) -> None:
    with hub.http() as http:
        assert http.get(f"/{quote('team')}/name/resolve/main/%61.txt").text == "hello"
