"""The hub's own promises against a live hub: versions, channels, rights, damaged blobs, hostile commits."""

import json
import threading
from pathlib import Path

import httpx
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import BadRequestError

from live_hub import LiveHub, live_hub
from loractl.adapters.digest import file_sha256, folder_digest
from loractl.hub.access import OPT_KEY
from loractl.hub.app import create_app
from loractl.hub.settings import HubSettings

_API = "/api/loractl/v1"


def _push(hub: LiveHub, folder: Path, repo: str = "team/name", *, channel: str = "main") -> str:
    api = hub.api()
    api.create_repo(repo, exist_ok=True)
    files = [
        CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in folder.iterdir() if path.is_file()
    ]
    return str(api.create_commit(repo, operations=files, commit_message="push", revision=channel).oid)


def test_versions_count_up_and_resolve_to_digests(hub: LiveHub, adapter: Path, other_adapter: Path) -> None:
    _push(hub, adapter)
    second = _push(hub, other_adapter)
    with hub.http() as http:
        first = http.get(f"{_API}/resolve", params={"repo": "team/name", "revision": "v1"}).json()
        newest = http.get(f"{_API}/resolve", params={"repo": "team/name"}).json()
    assert first["digest"] == folder_digest(adapter)
    assert (newest["digest"], newest["version"], newest["commit"]) == (folder_digest(other_adapter), "v2", second)


def test_channel_moves_and_rolls_back_with_its_history(hub: LiveHub, adapter: Path, other_adapter: Path) -> None:
    first, second = _push(hub, adapter), _push(hub, other_adapter)
    place = f"{_API}/adapters/team/name"
    with hub.http() as http:
        made = http.post(f"{place}/promote", json={"channel": "prod", "revision": "v1", "expected_old": None})
        assert made.json()["new_commit"] == first
        again = http.post(f"{place}/promote", json={"channel": "prod", "revision": "v2", "expected_old": None})
        assert (again.status_code, again.json()["code"]) == (409, "CONFLICT")
        moved = http.post(f"{place}/promote", json={"channel": "prod", "revision": "v2", "expected_old": first})
        assert moved.json()["new_version"] == "v2"
        back = http.post(f"{place}/rollback", json={"channel": "prod", "reason": "worse"})
        assert (back.json()["old_commit"], back.json()["new_commit"]) == (second, first)
        moves = http.get(f"{place}/history", params={"channel": "prod"}).json()["moves"]
    assert [(move["kind"], move["new_version"]) for move in moves] == [
        ("rollback", "v1"),
        ("promote", "v2"),
        ("promote", "v1"),
    ]
    assert hub.api().model_info("team/name", revision="prod").sha == first


def test_one_of_many_racing_promotions_wins(hub: LiveHub, adapter: Path, other_adapter: Path) -> None:
    first = _push(hub, adapter)
    _push(hub, other_adapter)
    place = f"{_API}/adapters/team/name"
    with hub.http() as http:
        http.post(f"{place}/promote", json={"channel": "prod", "revision": "v1"})
        codes: list[int] = []

        def promote() -> None:
            body = {"channel": "prod", "revision": "v2", "expected_old": first}
            answer = httpx.post(hub.url + f"{place}/promote", json=body, headers=http.headers, timeout=30)
            codes.append(answer.status_code)

        threads = [threading.Thread(target=promote) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(codes) == [200, *[409] * 19]


def test_private_repo_looks_like_a_missing_one_to_others(hub: LiveHub) -> None:
    hub.api().create_repo("team/secret", private=True)
    other = hub.token("read", "write", pattern="elsewhere/*")
    with hub.http(other) as http:
        private, missing = http.get("/api/models/team/secret"), http.get("/api/models/team/absent")
        listed = http.get("/api/models").json()
    assert private.status_code == missing.status_code == 404
    assert private.headers["x-error-code"] == missing.headers["x-error-code"] == "RepoNotFound"
    assert private.json()["error"].replace("secret", "absent") == missing.json()["error"]
    assert listed == []


def test_rights_are_what_the_token_says(hub: LiveHub, adapter: Path) -> None:
    _push(hub, adapter)
    reader = hub.token("read")
    with hub.http(reader) as http:
        assert http.get("/api/models/team/name").status_code == 200
        assert http.post("/api/models/team/name/branch/x", json={}).status_code == 403
        assert http.get(f"{_API}/tokens").status_code == 403
        promoted = http.post(f"{_API}/adapters/team/name/promote", json={"channel": "prod", "revision": "v1"})
        assert promoted.status_code == 403
    with hub.http("") as http:
        nobody = http.get("/api/models/team/name")
    assert (nobody.status_code, nobody.headers["x-error-code"]) == (401, "RepoNotFound")


def test_revoked_token_is_refused_at_once(hub: LiveHub) -> None:
    with hub.http() as http:
        made = http.post(f"{_API}/tokens", json={"name": "ci", "roles": ["read"]}).json()
        with hub.http(made["secret"]) as other:
            assert other.get("/api/whoami-v2").status_code == 200
            http.delete(f"{_API}/tokens/{made['token']['id']}")
            assert other.get("/api/whoami-v2").status_code == 401


def test_every_route_has_a_policy(tmp_path: Path) -> None:
    app = create_app(HubSettings(root=tmp_path))
    open_routes = {
        handler.opt.get(OPT_KEY): route.path
        for route in app.routes
        for handler in getattr(route, "route_handlers", [])
        if not getattr(handler.fn, "__module__", "").startswith("litestar.")
    }
    assert None not in open_routes


@pytest.mark.parametrize(
    ("header", "status", "span"),
    [
        ("bytes=0-9", 206, slice(0, 10)),
        ("bytes=100-", 206, slice(100, None)),
        ("bytes=-7", 206, slice(-7, None)),
        ("bytes=999999999-", 416, slice(0, 0)),
        ("bytes=1-2,5-6", 200, slice(None)),
    ],
)
def test_range_gives_these_bytes(hub: LiveHub, adapter: Path, header: str, status: int, span: slice) -> None:
    _push(hub, adapter)
    expected = (adapter / "adapter_model.safetensors").read_bytes()[span]
    with hub.http() as http:
        answer = http.get("/team/name/resolve/v1/adapter_model.safetensors", headers={"Range": header})
    assert (answer.status_code, answer.content) == (status, expected)


def test_flipped_byte_is_never_sent(hub: LiveHub, adapter: Path) -> None:
    _push(hub, adapter)
    digest = file_sha256(adapter / "adapter_model.safetensors")
    data = bytearray(hub.blob_bytes(digest))
    data[len(data) // 2] ^= 1
    hub.spoil_blob(digest, bytes(data))
    with hub.http() as http:
        answer = http.get("/team/name/resolve/v1/adapter_model.safetensors")
        metrics = http.get("/metrics").text
    assert (answer.status_code, answer.json()["code"]) == (500, "BLOB_CORRUPT")
    assert 'loractl_hub_blob_errors_total{kind="corrupt"} 1.0' in metrics


def test_pushes_outlive_a_restart(adapter: Path, tmp_path: Path) -> None:
    with live_hub(tmp_path / "hub") as before:
        oid = _push(before, adapter)
        token = before.admin
    with live_hub(tmp_path / "hub") as after:
        assert after.api(token).model_info("team/name", revision="v1").sha == oid


def test_yet_another_weights_file_that_disagrees_is_refused(hub: LiveHub, adapter: Path) -> None:
    _push(hub, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"r": 8}
    operation = CommitOperationAdd("adapter_config.json", json.dumps(config).encode())
    with pytest.raises(BadRequestError, match="E_AB"):
        hub.api().create_commit("team/name", operations=[operation], commit_message="wrong rank")
    assert [tag.name for tag in hub.api().list_repo_refs("team/name").tags] == ["v1"]


def test_deleting_a_file_makes_a_commit_without_a_version(hub: LiveHub, adapter: Path) -> None:
    _push(hub, adapter)
    operation = CommitOperationDelete("adapter_model.safetensors")
    hub.api().create_commit("team/name", operations=[operation], commit_message="gone")
    assert not hub.api().file_exists("team/name", "adapter_model.safetensors")
    assert hub.api().file_exists("team/name", "adapter_model.safetensors", revision="v1")


_HEADER = '{"key":"header","value":{"summary":"x"}}\n'
_FILE = '{"key":"file","value":{"path":"%s","content":"aGk=","encoding":"base64"}}\n'


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        _FILE % "a",
        _HEADER * 2,
        _HEADER + _FILE % "a" * 2,
        _HEADER + _FILE % "a" + '{"key":"deletedFile","value":{"path":"a"}}\n',
        _HEADER + '{"key":"surprise","value":{}}\n',
        _HEADER + _FILE % "../../etc/passwd",
        _HEADER + _FILE % "/etc/passwd",
        _HEADER + _FILE % "a\\u0000b",
        _HEADER + '{"key":"file","value":{"path":"a","content":"!!","encoding":"base64"}}\n',
        _HEADER + '{"key":"lfsFile","value":{"path":"a","oid":"%s","algo":"sha256"}}\n' % ("0" * 64),
        _HEADER + "[" * 100_000 + "\n",
    ],
)
def test_hostile_commit_changes_nothing(hub: LiveHub, body: str) -> None:
    hub.api().create_repo("team/name")
    with hub.http() as http:
        before = http.get("/api/models/team/name").json()["sha"]
        answer = http.post(
            "/api/models/team/name/commit/main",
            content=body.encode(),
            headers={"Content-Type": "application/x-ndjson"},
        )
        assert answer.status_code == 400, answer.text
        assert answer.json()["code"] in {"BAD_REQUEST", "ADAPTER_INVALID"}
        assert http.get("/api/models/team/name").json()["sha"] == before


def test_upload_address_is_good_for_its_object_alone(hub: LiveHub) -> None:
    hub.api().create_repo("team/name")
    with hub.http() as http:
        batch = http.post(
            "/team/name.git/info/lfs/objects/batch",
            json={"operation": "upload", "transfers": ["basic"], "objects": [{"oid": "a" * 64, "size": 4}]},
        ).json()
    href = batch["objects"][0]["actions"]["upload"]["href"]
    assert httpx.put(href, content=b"four").status_code == 400
    assert httpx.put(href.replace("a" * 64, "b" * 64), content=b"four").status_code == 403
    assert httpx.put(href.replace("size=4", "size=5"), content=b"fours").status_code == 403
    assert httpx.put(href, content=b"more than four").status_code == 413


def test_old_name_leads_to_the_moved_repo(hub: LiveHub, adapter: Path) -> None:
    oid = _push(hub, adapter)
    hub.api().move_repo("team/name", "team/better")
    assert hub.api().model_info("team/name").sha == oid
    assert hub.api().hf_hub_download("team/name", "adapter_config.json", revision="v1")


def test_protected_channel_needs_the_right_to_promote(hub: LiveHub, adapter: Path) -> None:
    _push(hub, adapter)
    hub.api().create_branch("team/name", branch="prod")
    with hub.http() as http:
        body = {"channel": "prod", "protected": True}
        assert http.post(f"{_API}/adapters/team/name/protect", json=body).status_code == 200
    place = f"{_API}/adapters/team/name/promote"
    wanted = {"channel": "prod", "revision": "v1"}
    with hub.http(hub.token("write")) as http:
        assert http.post(place, json=wanted).status_code == 403
    with hub.http(hub.token("promote")) as http:
        assert http.post(place, json=wanted).status_code == 200


def test_yanked_version_still_resolves_with_a_warning(hub: LiveHub, adapter: Path) -> None:
    _push(hub, adapter)
    with hub.http() as http:
        body = {"revision": "v1", "reason": "wrong labels"}
        assert http.post(f"{_API}/adapters/team/name/yank", json=body).status_code == 200
        file = http.get("/team/name/resolve/v1/adapter_config.json")
        resolved = http.get(f"{_API}/resolve", params={"repo": "team/name", "revision": "v1"}).json()
    assert (file.status_code, resolved["yanked"]) == (200, "wrong labels")
    assert "wrong labels" in file.headers["x-hf-warning"]
