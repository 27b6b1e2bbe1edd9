"""Every route against every kind of token: what the route's policy says is what happens."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from live_hub import LiveHub, live_hub
from loractl.hub.access import OPT_KEY, Policy
from loractl.hub.app import create_app
from loractl.hub.settings import HubSettings
from pushing import push

# Who meets which gate. A private repo of `team` stands behind every route that names one.
GATES: dict[Policy, Mapping[str, int | str]] = {
    Policy.READ: {"nobody": 401, "stranger": 404, "reader": "in", "writer": "in", "promoter": "in", "owner": "in"},
    Policy.WRITE: {"nobody": 401, "stranger": 404, "reader": 403, "writer": "in", "promoter": 403, "owner": "in"},
    Policy.PROMOTE: {"nobody": 401, "stranger": 404, "reader": 403, "writer": 403, "promoter": "in", "owner": "in"},
    Policy.ADMIN: {"nobody": 401, "stranger": 404, "reader": 403, "writer": 403, "promoter": 403, "owner": "in"},
    Policy.HUB_ADMIN: {
        "nobody": 401,
        "stranger": 403,
        "reader": 403,
        "writer": 403,
        "promoter": 403,
        "owner": 403,
    },
    Policy.TOKEN: {"nobody": 401},
}
# Behind these a handler looks at the rights itself; opening another route to so many has to be written here.
TOKEN_ROUTES = {
    "/api/whoami-v2", "/api/repos/create", "/api/repos/delete", "/api/repos/move", "/api/validate-yaml", "/api/models",
    "/api/loractl/v1/resolve", "/api/loractl/v1/adapters", "/api/loractl/v1/diff", "/api/loractl/v1/events",
    "/api/loractl/v1/webhooks", "/api/loractl/v1/webhooks/{number:int}", "/api/loractl/v1/webhooks/{number:int}/test",
    "/api/loractl/v1/webhooks/{number:int}/deliveries",
    "/api/loractl/v1/webhooks/{number:int}/deliveries/{delivery:int}/retry",
}  # fmt: skip
SIGNED_ROUTES = {
    "/lfs/{repo_key:int}/objects/{oid:str}", "/lfs/sessions/{session:str}/parts/{number:int}",
    "/lfs/sessions/{session:str}/complete/{oid:str}", "/xet/{session:str}/v1/xorbs/default/{xorb:str}",
    "/xet/{session:str}/v1/shards",
}  # fmt: skip
PUBLIC_ROUTES = {"/healthz", "/readyz", "/metrics", "/login", "/logout", "/static/hub.css", "/static/icon.svg"}
_FILLED = {
    "namespace": "team", "name": "name", "revision": "main", "branch": "other", "path": "/README.md", "repo_key": "1",
    "oid": "0" * 64, "session": "0" * 32, "number": "1", "delivery": "1", "token_id": "none", "xorb": "0" * 64,
    "rest": "/x",
}  # fmt: skip


def _routes() -> list[tuple[str, str, Policy | None]]:
    """(method, path, policy) of every handler of ours; Litestar's own OPTIONS handlers answer nothing but methods."""
    app = create_app(HubSettings(root=Path("nowhere")))
    found: list[tuple[str, str, Policy | None]] = []
    for route in app.routes:
        for handler in getattr(route, "route_handlers", []):
            methods = sorted(set(handler.http_methods) - {"HEAD"})
            if methods == ["OPTIONS"]:
                continue
            found += [(method, route.path, handler.opt.get(OPT_KEY)) for method in methods]
    return found


ROUTES = _routes()


def test_every_route_names_its_policy_and_the_open_ones_are_known() -> None:
    assert all(isinstance(policy, Policy) for _, _, policy in ROUTES), [one for one in ROUTES if one[2] is None]
    by_policy: dict[Policy | None, set[str]] = {}
    for _, path, policy in ROUTES:
        by_policy.setdefault(policy, set()).add(path)
    assert by_policy[Policy.TOKEN] == TOKEN_ROUTES
    assert by_policy[Policy.SIGNED] == SIGNED_ROUTES
    gaps = re.compile(
        r"/api/(spaces|datasets|collections|settings/webhooks|loractl/v1/schema)|/oauth/|.*/(discussions|lfs-files|super-squash)"
    )
    assert {path for path in by_policy[Policy.PUBLIC] if not gaps.match(path)} == PUBLIC_ROUTES


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, adapter: Path) -> Iterator[LiveHub]:
    with live_hub(tmp_path_factory.mktemp("matrix") / "hub") as running:
        running.api().create_repo("team/name", private=True)
        push(running, adapter)
        yield running


@pytest.fixture(scope="module")
def secrets(hub: LiveHub) -> dict[str, str]:
    return {
        "nobody": "",
        "forger": "lch_" + "x" * 43,
        "stranger": hub.token("write", "promote", "admin", pattern="lab/*", name="stranger"),
        "reader": hub.token("read", pattern="team/*", name="reader"),
        "writer": hub.token("write", pattern="team/*", name="writer"),
        "promoter": hub.token("promote", pattern="team/*", name="promoter"),
        "owner": hub.token("admin", pattern="team/*", name="owner"),
    }


def _ask(http: httpx.Client, method: str, path: str) -> httpx.Response:
    filled = re.sub(r"\{(\w+):\w+\}", lambda found: _FILLED[found[1]], path).replace("//", "/")
    # A body that no route takes: what is asked is who gets as far as having it looked at.
    content = b"[]" if method in {"POST", "PUT", "PATCH", "DELETE"} else None
    return http.request(method, filled, content=content)


def _gate(answer: httpx.Response) -> int | str:
    if answer.status_code == 401:
        return 401
    if (answer.status_code == 403 and "this token may not" in answer.text) or "only an admin of" in answer.text:
        return 403
    return 404 if answer.headers.get("x-error-code") == "RepoNotFound" else "in"


@pytest.mark.parametrize("who", ["nobody", "forger", "stranger", "reader", "writer", "promoter", "owner"])
def test_policy_is_what_happens(hub: LiveHub, secrets: dict[str, str], who: str) -> None:
    wrong: list[str] = []
    num_asked = 0
    with hub.http(secrets[who]) as http:
        for method, path, policy in ROUTES:
            if policy is None or policy not in GATES:
                continue
            expected = 401 if who == "forger" else GATES[policy].get(who, "in")
            if path.endswith("/events") and expected == "in":
                continue
            num_asked += 1
            answer = _ask(http, method, path)
            if answer.status_code >= 500 or _gate(answer) != expected:
                wrong.append(
                    f"{method} {path}: {answer.status_code} {answer.text[:120]}; the policy {policy}: {expected}"
                )
    assert not wrong, "\n".join(wrong)
    assert num_asked > 30


@pytest.mark.parametrize("who", ["nobody", "forger", "stranger", "owner"])
def test_signed_route_takes_no_token_for_a_signature(hub: LiveHub, secrets: dict[str, str], who: str) -> None:
    with hub.http(secrets[who]) as http:
        for method, path, policy in ROUTES:
            if policy is Policy.SIGNED:
                answer = _ask(http, method, path)
                assert answer.status_code in {400, 401, 403, 404}, (path, answer.text)


# Where the name stands in the body or the query, the handler's own look at the rights.
_OWN = "/api/loractl/v1"
_NAME = {"name": "name", "organization": "team"}
_MOVE = {"fromRepo": "team/name", "toRepo": "team/x", "type": "model"}
_HOOK = {"url": "https://example.com/", "pattern": "team/*"}
_PROMOTE = {"channel": "prod", "revision": "v1"}
_OTHERS = {"reader": 403, "writer": 403, "promoter": 403}
_BODIES: list[tuple[str, str, dict[str, Any], dict[str, int]]] = [
    ("POST", "/api/repos/create", _NAME | {"name": "new"}, {"stranger": 403, "reader": 403, "promoter": 403}),
    ("DELETE", "/api/repos/delete", _NAME, {"stranger": 404} | _OTHERS),
    ("POST", "/api/repos/move", _MOVE, {"stranger": 404} | _OTHERS),
    ("POST", f"{_OWN}/adapters/team/name/promote", _PROMOTE, {"stranger": 404, "reader": 403}),
    ("POST", f"{_OWN}/adapters/team/name/rollback", {"channel": "main"}, {"stranger": 404, "reader": 403}),
    ("POST", f"{_OWN}/webhooks", _HOOK, _OTHERS),
]


@pytest.mark.parametrize(("method", "path", "body", "refused"), _BODIES, ids=[path for _, path, _, _ in _BODIES])
def test_name_in_the_body_is_judged_too(
    hub: LiveHub, secrets: dict[str, str], method: str, path: str, body: dict[str, Any], refused: dict[str, int]
) -> None:
    for who, status in (refused | {"nobody": 401, "forger": 401}).items():
        with hub.http(secrets[who]) as http:
            assert (who, http.request(method, path, json=body).status_code) == (who, status)
    assert hub.api().repo_exists("team/name")


def test_stranger_learns_nothing_from_questions_by_name(hub: LiveHub, secrets: dict[str, str]) -> None:
    with hub.http(secrets["stranger"]) as http:
        for name in ("team/name", "team/missing"):
            answer = http.get("/api/loractl/v1/resolve", params={"repo": name, "revision": "main"})
            assert (answer.status_code, answer.json()["code"]) == (404, "REPO_NOT_FOUND")
        assert http.get("/api/models").json() == []
        assert "team/name" not in http.get("/api/loractl/v1/adapters").text
