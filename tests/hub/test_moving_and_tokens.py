"""Old names with stock clients, and what tokens may and may no longer do, against a live hub."""

import asyncio
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from live_hub import LiveHub
from loractl.adapters.digest import folder_digest
from loractl.adapters.errors import NotAllowed, UsageError
from loractl.adapters.reference import parse_reference
from loractl.hub.actor import SYSTEM
from loractl.hub.client import HubClient
from loractl.hub.run import first_token
from loractl.hub.services import open_hub
from loractl.hub.settings import HubSettings
from loractl.hub.wire import TokenCreate
from pushing import push

_API = "/api/loractl/v1"


def test_old_name_serves_every_stock_download_after_two_moves(hub: LiveHub, adapter: Path, tmp_path: Path) -> None:
    oid = push(hub, adapter)
    api = hub.api()
    api.move_repo("team/name", "team/better")
    api.move_repo("team/better", "lab/best")
    for name in ("team/name", "team/better", "lab/best"):
        assert api.model_info(name, revision="v1").sha == oid
        cache = tmp_path / name
        fetched = snapshot_download(name, revision="v1", endpoint=hub.url, token=hub.admin, cache_dir=cache)
        assert folder_digest(Path(fetched)) == folder_digest(adapter)
        assert hf_hub_download(name, "adapter_config.json", endpoint=hub.url, token=hub.admin, cache_dir=cache)
        assert [tag.name for tag in api.list_repo_refs(name).tags] == ["v1"]
        with HubClient(hub.url, hub.admin) as client:
            assert client.resolve(parse_reference(name)).repo_id == "lab/best"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.delete_repo("team/name")
    assert api.repo_exists("lab/best")


def test_old_name_of_a_private_repo_says_nothing_to_others(hub: LiveHub) -> None:
    api = hub.api()
    api.create_repo("team/name", private=True)
    api.move_repo("team/name", "team/moved")
    with hub.http(hub.token("read", "write", pattern="elsewhere/*")) as http:
        old, missing = http.get("/api/models/team/name"), http.get("/api/models/team/xxxx")
    assert (old.status_code, old.headers.get("location")) == (404, None)
    assert old.json()["error"] == missing.json()["error"].replace("xxxx", "name")


def test_token_ends_by_itself(hub: LiveHub) -> None:
    async def expired() -> str:
        async with open_hub(hub.settings) as opened:
            wanted = TokenCreate(name="old", roles=["read"], expires_in_days=1)
            made = await opened.tokens.create(wanted, actor=SYSTEM)
            async with opened.database.write() as connection:
                await connection.exec_driver_sql(f"UPDATE token SET expires_at = 1.0 WHERE id = '{made.token.id}'")
            return made.secret

    secret = asyncio.run(expired())
    with hub.http(secret) as http:
        answer = http.get("/api/models")
    assert answer.status_code == 401
    assert "expired" in answer.json()["error"]


def test_last_use_of_a_token_is_listed_and_its_secret_is_not(hub: LiveHub) -> None:
    secret = hub.token("read", name="ci")
    with hub.http() as http:
        before = next(one for one in http.get(f"{_API}/tokens").json()["tokens"] if one["name"] == "ci")
        with hub.http(secret) as own:
            assert own.get("/api/models").status_code == 200
        listed = http.get(f"{_API}/tokens")
    after = next(one for one in listed.json()["tokens"] if one["name"] == "ci")
    assert before["last_used_at"] is None
    assert after["last_used_at"] is not None
    assert secret not in listed.text
    assert secret.endswith(after["last4"])


def test_first_token_is_made_once_and_a_hub_without_a_valid_one_stays_on_loopback(tmp_path: Path) -> None:
    settings = HubSettings(root=tmp_path / "hub")
    assert asyncio.run(first_token(settings))
    assert asyncio.run(first_token(settings)) is None

    async def revoke_all() -> None:
        async with open_hub(settings) as opened:
            for view in await opened.tokens.list_all():
                await opened.tokens.revoke(view.id, actor=SYSTEM)

    asyncio.run(revoke_all())
    assert asyncio.run(first_token(settings)) is None
    outside = HubSettings(root=tmp_path / "hub", host="0.0.0.0")
    with pytest.raises(UsageError, match="revoked or expired"):
        asyncio.run(first_token(outside))


def test_protected_channel_takes_no_commit_of_a_writer(hub: LiveHub, adapter: Path, other_adapter: Path) -> None:
    push(hub, adapter)
    with hub.http() as http:
        assert http.post(f"{_API}/adapters/team/name/protect", json={"channel": "main"}).status_code == 200
    with pytest.raises(HfHubHTTPError, match="403"):
        push(hub, other_adapter, token=hub.token("write"))
    push(hub, other_adapter, token=hub.token("write", "promote"))


def test_refusal_says_its_hint_once(hub: LiveHub) -> None:
    with HubClient(hub.url, None) as client, pytest.raises(NotAllowed) as caught:
        client.show(parse_reference("team/name"))
    assert caught.value.hint is not None
    assert caught.value.hint not in caught.value.message


def test_refused_push_says_its_hint_once(hub: LiveHub, adapter: Path) -> None:
    with HubClient(hub.url, hub.token("read")) as client, pytest.raises(NotAllowed) as caught:
        client.push(adapter, parse_reference("team/name"))
    assert caught.value.hint is not None
    assert caught.value.hint not in caught.value.message


def test_taken_name_of_a_hidden_repo_does_not_tell_its_present_name(hub: LiveHub) -> None:
    api = hub.api()
    api.create_repo("team/name", private=True)
    api.move_repo("team/name", "secret/project")
    with pytest.raises(HfHubHTTPError, match="409") as caught:
        hub.api(hub.token("write", pattern="team/*")).create_repo("team/name")
    assert "secret/project" not in str(caught.value)
