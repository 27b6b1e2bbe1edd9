"""Keys open what they should and nothing else; without keys the server stays on this machine."""

from pathlib import Path
from typing import Any

import pytest

from loractl.adapters.errors import BadData, UsageError
from loractl.server.access import Access, KeysFile
from loractl.server.assemble import Choices, check
from tiny_models import make_tiny_base

USER, ADMIN = "user-key-0123456789", "admin-key-0123456789"
PROTECTED = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
]
ADMIN_ONLY = [
    ("GET", "/admin/status"),
    ("POST", "/admin/drain"),
    *[("POST", f"/admin/adapters/{action}") for action in ("load", "prefetch", "pin", "unpin", "unload")],
]


@pytest.fixture
def access(tmp_path: Path) -> Access:
    path = tmp_path / "keys"
    path.write_text(f"# people\n{USER} blue weight=2\n\n{ADMIN} red admin\n")
    return Access.from_file(path)


@pytest.mark.parametrize(("method", "path"), [*PROTECTED, *ADMIN_ONLY])
@pytest.mark.parametrize("header", [None, "Bearer wrong-key-0123456789", "Basic abc", USER])
async def test_request_without_a_known_key_is_401(
    start_server: Any, access: Access, method: str, path: str, header: str | None
) -> None:
    live = await start_server(access=access)
    response = await live.http.request(method, path, headers={"authorization": header} if header else {})
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(("method", "path"), ADMIN_ONLY)
async def test_admin_route_refuses_a_user_key(start_server: Any, access: Access, method: str, path: str) -> None:
    live = await start_server(access=access)
    response = await live.http.request(method, path, headers={"authorization": f"Bearer {USER}"})
    assert response.status_code == 403


async def test_key_gives_the_request_its_tenant_and_share(start_server: Any, access: Access) -> None:
    live = await start_server(access=access)
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1, "priority": 50}
    response = await live.http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {USER}"})
    assert response.status_code == 200
    submit = live.engine.submitted[0]
    assert (submit.tenant, submit.weight, submit.priority) == ("blue", 2.0, 0)


async def test_health_and_metrics_need_no_key(start_server: Any, access: Access) -> None:
    live = await start_server(access=access)
    for path in ("/healthz", "/readyz", "/metrics", "/metrics/routing"):
        assert (await live.http.get(path)).status_code == 200


async def test_admin_pins_and_unloads(live: Any) -> None:
    cats = {"name": "cats"}
    assert (await live.http.post("/admin/adapters/pin", json=cats)).status_code == 200
    status = (await live.http.get("/admin/status")).json()
    assert [(adapter["name"], adapter["pinned"]) for adapter in status["adapters"]] == [("cats", True)]
    assert (await live.http.post("/admin/adapters/unpin", json=cats)).status_code == 200
    assert (await live.http.post("/admin/adapters/unload", json=cats)).status_code == 200
    assert (await live.http.get("/admin/status")).json()["adapters"] == []
    assert (await live.http.post("/admin/adapters/unload", json={"name": "team/never"})).status_code == 404


async def test_admin_brings_adapters_near_and_drains(live: Any) -> None:
    loaded = await live.http.post("/admin/adapters/load", json={"name": "cats"})
    assert (loaded.status_code, loaded.json()["action"]) == (200, "loading")
    assert (await live.http.post("/admin/adapters/prefetch", json={"name": "dogs"})).json()["action"] == "on disk"
    status = (await live.http.get("/admin/status")).json()
    assert [adapter["name"] for adapter in status["adapters"]] == ["cats"]
    assert (status["ready"], status["draining"]) == (True, False)
    missing = await live.http.post("/admin/adapters/load", json={"name": "team/nobody"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert (await live.http.post("/admin/drain")).json() == {"status": "drained"}
    assert (await live.http.get("/readyz")).status_code == 503
    late = await live.http.post("/v1/embeddings", json={"model": "tiny", "input": "x"})
    assert (late.status_code, "retry-after" in late.headers) == (503, True)


async def test_key_that_is_taken_out_of_the_file_is_refused(start_server: Any, tmp_path: Path) -> None:
    path, now = tmp_path / "keys", [0.0]
    path.write_text(f"{USER} blue requests=1\n{ADMIN} red admin\n")
    file = KeysFile(path, clock=lambda: now[0])
    live = await start_server(access=Access(file.read(), file=file))

    async def ask(key: str) -> int:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
        answer = await live.http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
        return int(answer.status_code)

    assert [await ask(USER), await ask(USER), await ask(ADMIN)] == [200, 429, 200]
    path.write_text(f"{USER} blue requests=9\n")
    assert await ask(ADMIN) == 200
    now[0] = 60.0
    assert [await ask(USER), await ask(ADMIN)] == [200, 401]
    path.write_text("short\n")
    now[0] = 120.0
    assert [await ask(USER), await ask(ADMIN)] == [200, 401]
    path.unlink()
    now[0] = 180.0
    assert await ask(USER) == 200


@pytest.mark.parametrize("content", ["", "short\n", f"{USER} a b\n", f"{USER} weight=x\n", f"{USER} weight=0\n"])
def test_bad_keys_file_is_refused_without_showing_the_key(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(BadData) as caught:
        Access.from_file(path)
    assert USER not in caught.value.message


@pytest.mark.parametrize(("host", "is_refused"), [("127.0.0.1", False), ("::1", False), ("0.0.0.0", True)])
def test_server_without_keys_listens_on_loopback_only(tmp_path: Path, host: str, is_refused: bool) -> None:
    base = make_tiny_base(tmp_path / "tiny-base")
    choices = Choices(base=str(base), host=host)
    if is_refused:
        with pytest.raises(UsageError, match="would let everybody"):
            check(choices)
    else:
        assert check(choices).base_name == "tiny-base"
