"""What an operator has of a live hub: the audit log that only grows, and quotas that hold."""

import json
import sqlite3
from pathlib import Path

import pytest
from huggingface_hub.errors import HfHubHTTPError

from live_hub import LiveHub
from loractl.adapters.errors import WillNotFit
from loractl.adapters.reference import AdapterRef
from loractl.hub.client import HubClient
from loractl.hub.database import SQLITE_FILE
from pushing import push

_API = "/api/loractl/v1"


def _audit(hub: LiveHub, **params: str | int) -> list[dict[str, object]]:
    with hub.http() as http:
        answer = http.get(f"{_API}/audit", params=params)
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in answer.text.splitlines()]


def test_audit_log_tells_who_did_what_as_json_lines(hub: LiveHub, adapter: Path) -> None:
    push(hub, adapter)
    with hub.http() as http:
        http.post(f"{_API}/adapters/team/name/promote", json={"channel": "prod", "revision": "v1"})
    entries = _audit(hub)
    assert [entry["action"] for entry in entries] == ["token.create", "repo.create", "commit", "channel.promote"]
    assert str(entries[-1]["actor"]).startswith("admin/")
    assert [entry["action"] for entry in _audit(hub, after=int(str(entries[1]["id"])), limit=1)] == ["commit"]
    assert [entry["id"] for entry in _audit(hub, actor="admin", target="team/name", action="commit")] == [
        entries[2]["id"]
    ]
    assert _audit(hub, since="2999-01-01T00:00:00Z") == []
    assert hub.admin not in json.dumps(entries)


def test_audit_log_is_for_admins_of_the_hub(hub: LiveHub) -> None:
    with hub.http(hub.token("admin", pattern="team/*")) as http:
        assert http.get(f"{_API}/audit").status_code == 403


@pytest.mark.parametrize("statement", ["DELETE FROM audit", "UPDATE audit SET actor = 'nobody'"])
def test_line_of_the_audit_log_cannot_be_changed_behind_the_hubs_back(folder_hub: LiveHub, statement: str) -> None:
    connection = sqlite3.connect(folder_hub.settings.root / SQLITE_FILE)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)
    connection.close()


def test_push_beyond_the_quota_is_refused_with_figure_and_fix(hub: LiveHub, adapter: Path, other_adapter: Path) -> None:
    push(hub, adapter)
    used = sum(path.stat().st_size for path in adapter.iterdir())
    with hub.http() as http:
        view = http.put(f"{_API}/quotas/team", json={"size_bytes": used + 100}).json()
        assert (view["used_bytes"], view["quota_bytes"], view["num_repos"]) == (used, used + 100, 1)
        figures = rf"{used:,} of its {used + 100:,} bytes.*"
        with pytest.raises(HfHubHTTPError, match=rf"(?s)413.*{figures}quota set team --bytes"):
            push(hub, other_adapter)
        with HubClient(hub.url, hub.admin) as client, pytest.raises(WillNotFit, match=figures):
            client.push(other_adapter, AdapterRef("team", "name"))
        http.put(f"{_API}/quotas/team", json={"size_bytes": None})
        push(hub, other_adapter)
        listed = http.get(f"{_API}/quotas").json()["quotas"]
    assert [one["is_default"] for one in listed] == [True]


def test_quota_holds_at_the_commit_too(hub: LiveHub) -> None:
    """A client that asks for no permission beforehand."""
    hub.api().create_repo("team/name")
    lines = '{"key":"header","value":{"summary":"x"}}\n{"key":"file","value":{"path":"a.txt","content":"aGVsbG8="}}\n'
    with hub.http() as http:
        http.put(f"{_API}/quotas/team", json={"size_bytes": 4})
        answer = http.post("/api/models/team/name/commit/main", content=lines.encode())
        assert (answer.status_code, answer.json()["code"]) == (413, "WILL_NOT_FIT")
        http.put(f"{_API}/quotas/team", json={"size_bytes": 5})
        assert http.post("/api/models/team/name/commit/main", content=lines.encode()).status_code == 200


def test_repos_beyond_the_quota_are_refused_and_moving_in_is_no_way_around(hub: LiveHub) -> None:
    api = hub.api()
    api.create_repo("team/one")
    api.create_repo("lab/other")
    with hub.http() as http:
        http.put(f"{_API}/quotas/team", json={"num_repos": 1})
    with pytest.raises(HfHubHTTPError, match=r"team has 1 of its 1 repos.*quota set team --repos 2"):
        api.create_repo("team/two")
    with pytest.raises(HfHubHTTPError, match="413"):
        api.move_repo("lab/other", "team/other")
    api.move_repo("team/one", "team/renamed")


def test_quota_is_for_admins_of_the_hub_and_its_body_is_checked(hub: LiveHub) -> None:
    with hub.http(hub.token("admin", pattern="team/*")) as http:
        assert http.put(f"{_API}/quotas/team", json={"size_bytes": 0}).status_code == 403
    with hub.http() as http:
        for body in ({"size_bytes": -1}, {"bytes": 1}, {"num_repos": "many"}):
            assert http.put(f"{_API}/quotas/team", json=body).status_code == 400
        assert http.put(f"{_API}/quotas/..", json={}).status_code in {400, 404}


def test_metrics_tell_of_uploads_pool_and_backlog(folder_hub: LiveHub, adapter: Path) -> None:
    push(folder_hub, adapter)
    with folder_hub.http("") as http:
        page = http.get("/metrics").text
    found = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in page.splitlines() if line[0] != "#"}
    assert found["loractl_hub_upload_seconds_count"] >= 1
    assert found["loractl_hub_upload_bytes_total"] >= (adapter / "adapter_model.safetensors").stat().st_size
    assert found["loractl_hub_uploads_in_progress"] == found["loractl_hub_webhook_deliveries_pending"] == 0
    assert found['loractl_hub_db_pool{state="busy"}'] + found['loractl_hub_db_pool{state="idle"}'] >= 1
