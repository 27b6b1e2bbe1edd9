"""Webhooks of a live hub against a real receiver that checks signatures by the specification's own library."""

import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError

from live_hub import LiveHub, live_hub
from loractl.hub.outbound import is_public
from loractl.hub.webhooks import signature_headers
from pushing import push

_HOOKS = "/api/loractl/v1/webhooks"


@dataclass
class Receiver:
    """Keeps what arrives and answers as the test says."""

    url: str
    status: int = 200
    seen: list[tuple[dict[str, str], bytes]] = field(default_factory=list[tuple[dict[str, str], bytes]])


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    kept: list[Receiver] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            kept[0].seen.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(kept[0].status)
            self.send_header("location", "http://127.0.0.1:9/elsewhere")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            del format, args

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        kept.append(Receiver(f"http://127.0.0.1:{server.server_address[1]}/hook"))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield kept[0]
        server.shutdown()
        thread.join(10)


@pytest.fixture
def open_hub(tmp_path: Path) -> Iterator[LiveHub]:
    """A hub whose operator lets webhooks reach this machine, with short waits."""
    with live_hub(
        tmp_path / "hub", webhook_private_addresses=True, webhook_attempts=3, webhook_retry_s=0.05
    ) as running:
        yield running


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _make(hub: LiveHub, url: str, *, token: str | None = None, **wanted: Any) -> dict[str, Any]:
    with hub.http(token) as http:
        answer = http.post(_HOOKS, json={"url": url, **wanted})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def _journal(hub: LiveHub, number: int, **params: Any) -> list[dict[str, Any]]:
    with hub.http() as http:
        found: list[dict[str, Any]] = http.get(f"{_HOOKS}/{number}/deliveries", params=params).json()["deliveries"]
    return found


def test_event_arrives_signed_so_that_the_specifications_library_takes_it(
    open_hub: LiveHub, receiver: Receiver, adapter: Path
) -> None:
    made = _make(open_hub, receiver.url, pattern="team/*", kinds=["version.created"])
    oid = push(open_hub, adapter)
    push(open_hub, adapter, "lab/other")
    _until(lambda: bool(receiver.seen))
    headers, body = receiver.seen[0]
    event = Webhook(made["secret"]).verify(body, headers)
    assert (event["kind"], event["repo_id"], event["data"]["commit"]) == ("version.created", "team/name", oid)
    with pytest.raises(WebhookVerificationError):
        Webhook(made["secret"]).verify(body.replace(b"team/name", b"team/evil"), headers)
    number = made["webhook"]["id"]
    _until(lambda: [one["state"] for one in _journal(open_hub, number)] == ["done"])
    assert len(receiver.seen) == 1


def test_failed_delivery_is_tried_again_given_up_and_sent_by_hand(open_hub: LiveHub, receiver: Receiver) -> None:
    receiver.status = 500
    number = _make(open_hub, receiver.url, kinds=["repo.created"])["webhook"]["id"]
    open_hub.api().create_repo("team/name")
    _until(lambda: [one["state"] for one in _journal(open_hub, number)] == ["dead"])
    dead = _journal(open_hub, number, state="dead")[0]
    assert (dead["num_attempts"], dead["last_status"], dead["last_error"]) == (3, 500, "answered 500")
    assert len({headers["webhook-id"] for headers, _ in receiver.seen}) == 1
    assert len(receiver.seen) == 3
    receiver.status = 200
    with open_hub.http() as http:
        assert http.post(f"{_HOOKS}/{number}/deliveries/{dead['id']}/retry").json()["state"] == "pending"
        assert http.post(f"{_HOOKS}/{number}/deliveries/999/retry").status_code == 404
    _until(lambda: [one["state"] for one in _journal(open_hub, number)] == ["done"])


def test_redirect_is_a_failure_and_not_followed(open_hub: LiveHub, receiver: Receiver) -> None:
    receiver.status = 302
    number = _make(open_hub, receiver.url)["webhook"]["id"]
    with open_hub.http() as http:
        result = http.post(f"{_HOOKS}/{number}/test").json()
    assert result == {"delivered": False, "status": 302, "error": "answered 302"}


def test_test_message_is_sent_at_once(open_hub: LiveHub, receiver: Receiver) -> None:
    made = _make(open_hub, receiver.url)
    with open_hub.http() as http:
        assert http.post(f"{_HOOKS}/{made['webhook']['id']}/test").json()["delivered"] is True
    headers, body = receiver.seen[0]
    assert Webhook(made["secret"]).verify(body, headers)["kind"] == "webhook.test"


def test_deliveries_outlive_the_hubs_end(tmp_path: Path, receiver: Receiver) -> None:
    options: dict[str, Any] = {"webhook_private_addresses": True, "webhook_retry_s": 0.05, "webhook_attempts": 1000}
    receiver.status = 503
    with live_hub(tmp_path / "hub", **options) as before:
        _make(before, receiver.url, kinds=["repo.created"])
        before.api().create_repo("team/name")
        _until(lambda: bool(receiver.seen))
    receiver.status = 200
    num_before = len(receiver.seen)
    with live_hub(tmp_path / "hub", **options):
        # What was claimed when the hub ended is claimed again when its lease has passed; retries are due at once.
        _until(lambda: len(receiver.seen) > num_before)
    assert json.loads(receiver.seen[-1][1])["repo_id"] == "team/name"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x", "http://localhost/x", "http://[::1]/x", "http://10.0.0.1/x", "http://192.168.1.1:8080/",
        "http://169.254.169.254/latest/meta-data", "http://[fe80::1]/", "http://0.0.0.0/", "http://2130706433/",
        "http://[::ffff:127.0.0.1]/", "http://0x7f.1/", "http://100.64.0.1/", "http://[64:ff9b::7f00:1]/",
    ],
)  # fmt: skip
def test_address_of_the_hubs_own_network_is_refused(hub: LiveHub, url: str) -> None:
    with hub.http() as http:
        answer = http.post(_HOOKS, json={"url": url})
    assert (answer.status_code, answer.json()["code"]) == (403, "NOT_ALLOWED")
    assert "LORACTL_HUB_WEBHOOK_PRIVATE_ADDRESSES" in answer.json()["hint"]


@pytest.mark.parametrize(
    "url", ["ftp://example.com/", "nothing", "http:///x", "https://user:word@example.com/", "http://a b/"]
)
def test_what_is_no_address_is_a_bad_request(hub: LiveHub, url: str) -> None:
    with hub.http() as http:
        assert http.post(_HOOKS, json={"url": url}).status_code == 400


@pytest.mark.parametrize(
    ("reason", "status"), [(socket.EAI_NONAME, 400), (socket.EAI_NODATA, 400), (socket.EAI_AGAIN, 503)]
)
def test_name_that_does_not_exist_is_told_from_name_servers_that_do_not_answer(
    hub: LiveHub, monkeypatch: pytest.MonkeyPatch, reason: int, status: int
) -> None:
    ask = socket.getaddrinfo

    def asked(host: Any, *args: Any, **options: Any) -> Any:
        if host == "nowhere.example":
            raise socket.gaierror(reason, "as asked for")
        return ask(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", asked)
    with hub.http() as http:
        answer = http.post(_HOOKS, json={"url": "https://nowhere.example/hook"})
    assert answer.status_code == status, answer.text
    assert "nowhere.example" in answer.text


@pytest.mark.parametrize(
    ("address", "expected"),
    [("93.184.216.34", True), ("2606:2800:220:1::1", True), ("2002:7f00:1::", False), ("224.0.0.1", False)],
)
def test_public_addresses_are_told_from_others(address: str, expected: bool) -> None:
    assert is_public(address) is expected


def test_name_that_comes_to_mean_this_machine_is_refused_when_it_is_sent_to(tmp_path: Path, receiver: Receiver) -> None:
    """The judgement at registration is not the one that counts."""
    root = tmp_path / "hub"
    with live_hub(root, webhook_private_addresses=True) as lenient:
        number = _make(lenient, receiver.url, kinds=["repo.created"])["webhook"]["id"]
    with live_hub(root) as strict, strict.http() as http:
        result = http.post(f"{_HOOKS}/{number}/test").json()
    assert result["delivered"] is False
    assert "its network" in result["error"]
    assert receiver.seen == []


def test_webhook_gets_nothing_beyond_the_pattern_of_the_token_that_made_it(
    open_hub: LiveHub, receiver: Receiver
) -> None:
    admin_of_lab = open_hub.token("admin", pattern="lab/*", name="lab")
    _make(open_hub, receiver.url, token=admin_of_lab, pattern="*")
    open_hub.api().create_repo("team/secret", private=True)
    open_hub.token("read")
    open_hub.api().create_repo("lab/own", private=True)
    _until(lambda: bool(receiver.seen))
    time.sleep(0.3)
    assert [json.loads(body)["repo_id"] for _, body in receiver.seen] == ["lab/own"]


def test_webhooks_are_seen_by_those_alone_who_administer_them(open_hub: LiveHub, receiver: Receiver) -> None:
    number = _make(open_hub, receiver.url)["webhook"]["id"]
    with open_hub.http(open_hub.token("admin", pattern="lab/*")) as lab:
        assert lab.get(_HOOKS).json() == {"webhooks": []}
        for answer in (lab.delete(f"{_HOOKS}/{number}"), lab.post(f"{_HOOKS}/{number}/test")):
            assert answer.status_code == 404
    with open_hub.http(open_hub.token("write", "promote")) as writer:
        assert writer.post(_HOOKS, json={"url": receiver.url}).status_code == 403
        assert writer.get(_HOOKS).status_code == 403
    with open_hub.http() as http:
        listed = http.get(_HOOKS).text
        assert receiver.url in listed
        assert "whsec_" not in listed
        assert http.delete(f"{_HOOKS}/{number}").status_code == 200
        assert http.get(_HOOKS).json() == {"webhooks": []}
        assert "whsec_" not in http.get("/api/loractl/v1/audit").text


def test_signature_is_the_specifications() -> None:
    secret, body, at = "whsec_" + "A" * 44, b'{"a":1}', int(time.time())
    headers = signature_headers(secret, message_id="msg_1", at=at, body=body)
    assert Webhook(secret).verify(body, headers) == {"a": 1}
