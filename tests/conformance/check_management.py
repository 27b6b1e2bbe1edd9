"""Management: who am I, repos as a whole, and what this hub does not have."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from faulty_proxy import faulty_proxy
from wire import status_of


@pytest.mark.parametrize(
    ("roles", "shown"), [(["read"], "read"), (["write"], "write"), (["promote"], "read"), (["admin"], "write")]
)
def test_whoami_tells_name_and_role(
    endpoint: str, make_token: Callable[..., str], roles: list[str], shown: str
) -> None:
    """T26."""
    found = HfApi(endpoint=endpoint, token=make_token(*roles, name="some-one")).whoami()
    assert (found["type"], found["name"], found["auth"]["accessToken"]["role"]) == ("user", "some-one", shown)
    assert found["orgs"] == []


def test_bad_token_is_named_so(endpoint: str) -> None:
    answer = httpx.get(f"{endpoint}/api/whoami-v2", headers={"Authorization": "Bearer hf_" + "x" * 34})
    assert (answer.status_code, answer.headers["x-error-message"]) == (
        401,
        "Invalid credentials in Authorization header",
    )
    # Before 1.0 the client raises its HTTP library's own error here, an OSError.
    with pytest.raises(OSError, match="Invalid user token"):
        HfApi(endpoint=endpoint, token="hf_" + "x" * 34).whoami()


def test_repo_made_twice_answers_409_with_its_address(
    api: HfApi, http: httpx.Client, namespace: str, make_token: Callable[..., str]
) -> None:
    """T1."""
    repo = f"{namespace}/twice"
    first = api.create_repo(repo)
    assert first.repo_id == repo
    body = {"name": "twice", "organization": namespace, "type": "model", "private": False}
    again = http.post("/api/repos/create", json=body)
    assert (again.status_code, again.json()["url"]) == (409, str(first))
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_repo(repo)
    assert status_of(refused.value) == 409
    assert api.create_repo(repo, exist_ok=True).repo_id == repo
    # Who may only read is refused, looks whether the repo is there, and goes on.
    reader = HfApi(endpoint=str(http.base_url).rstrip("/"), token=make_token("read"))
    assert reader.create_repo(repo, exist_ok=True).repo_id == repo
    with pytest.raises(HfHubHTTPError) as forbidden:
        reader.create_repo(f"{namespace}/never")
    assert status_of(forbidden.value) == 403
    api.delete_repo(repo)


_PUSH = """
import sys
from huggingface_hub import HfApi
folder, repo = sys.argv[1:]
print(HfApi().create_repo(repo))
print(HfApi().upload_folder(folder_path=folder, repo_id=repo).commit_url)
"""


def test_addresses_carry_the_host_that_was_asked(
    endpoint: str, client_environment: dict[str, str], api: HfApi, namespace: str, adapter: Path
) -> None:
    """T2: clients refuse another host, so `localhost`, `127.0.0.1` and a proxy each get their own."""
    with faulty_proxy(endpoint) as proxy:
        port = endpoint.rpartition(":")[2]
        for number, address in enumerate((f"http://localhost:{port}", f"http://127.0.0.1:{port}", proxy.url)):
            made, commit = _push(client_environment | {"HF_ENDPOINT": address}, adapter, f"{namespace}/r{number}")
            assert made == f"{address}/{namespace}/r{number}"
            assert commit.startswith(f"{made}/commit/")
            api.delete_repo(f"{namespace}/r{number}")


def _push(environment: dict[str, str], folder: Path, repo: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", _PUSH, str(folder), repo],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_deleted_repo_is_missing(api: HfApi, namespace: str) -> None:
    repo = f"{namespace}/gone"
    api.create_repo(repo)
    api.delete_repo(repo)
    assert not api.repo_exists(repo)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(repo)
    api.delete_repo(repo, missing_ok=True)


def test_moved_repo_answers_under_both_names(
    api: HfApi, pushed: str, namespace: str, adapter: Path, tmp_path: Path
) -> None:
    sha = api.model_info(pushed).sha
    better = f"{namespace}/better"
    api.move_repo(pushed, better)
    for name in (pushed, better):
        assert api.model_info(name).sha == sha
        assert api.model_info(name, revision="v1").sha == sha
        path = api.hf_hub_download(name, "adapter_config.json", cache_dir=tmp_path / name.replace("/", "-"))
        assert Path(path).read_bytes() == (adapter / "adapter_config.json").read_bytes()
        assert api.snapshot_download(name, revision="v1", cache_dir=tmp_path / name.replace("/", "-"))
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_repo(pushed)
    assert status_of(refused.value) == 409
    api.delete_repo(better)


def test_settings_hide_and_show(api: HfApi, endpoint: str, make_token: Callable[..., str], pushed: str) -> None:
    stranger = HfApi(endpoint=endpoint, token=make_token("read", pattern="other-*/*"))
    assert stranger.repo_exists(pushed)
    api.update_repo_settings(pushed, private=True)
    assert api.model_info(pushed).private is True
    assert not stranger.repo_exists(pushed)
    with pytest.raises(RepositoryNotFoundError):
        stranger.auth_check(pushed)
    api.auth_check(pushed)
    api.update_repo_settings(pushed, private=False)
    stranger.auth_check(pushed)
    with pytest.raises(HfHubHTTPError) as refused:
        api.update_repo_settings(pushed, gated="auto")
    assert status_of(refused.value) == 400


def test_card_is_looked_at_before_a_push(http: httpx.Client) -> None:
    answer = http.post("/api/validate-yaml", json={"content": "---\nlicense: mit\n---\n# x\n", "repoType": "model"})
    assert (answer.status_code, answer.json()) == (200, {"errors": [], "warnings": []})


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/agent-harnesses"),
        ("HEAD", "/api/telemetry/x"),
        ("POST", "/api/telemetry/x"),
        ("POST", "/v1/telemetry"),
    ],
)
def test_noise_of_clients_is_answered_404_at_once(http: httpx.Client, method: str, path: str) -> None:
    assert http.request(method, path).status_code == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/datasets"),
        ("GET", "/api/datasets/team/name"),
        ("GET", "/api/spaces/team/name"),
        ("GET", "/api/collections"),
        ("POST", "/api/collections"),
        ("GET", "/api/settings/webhooks"),
        ("GET", "/api/models/team/name/discussions"),
        ("POST", "/oauth/device"),
    ],
)
def test_gap_is_answered_501_with_the_reason(http: httpx.Client, method: str, path: str) -> None:
    answer = http.request(method, path)
    assert answer.status_code == 501
    assert "not supported by this hub" in answer.headers["x-error-message"]
    assert "not supported by this hub" in answer.json()["error"]


def test_other_kinds_of_repos_are_refused_with_the_reason(api: HfApi, namespace: str) -> None:
    with pytest.raises(HfHubHTTPError, match="keeps adapters only"):
        api.create_repo(f"{namespace}/data", repo_type="dataset")


def test_error_carries_the_id_of_its_request(http: httpx.Client, pushed: str) -> None:
    answer = http.get(f"/api/models/{pushed}-absent")
    assert answer.headers["x-request-id"] == answer.json()["request_id"]


@pytest.mark.parametrize("name", ["-a/b", "a/b.git", "a--b/c", "a..b/c", "a/" + "x" * 97, "api/x", "ü/x", "a/b/c"])
def test_repo_of_a_bad_name_is_refused(http: httpx.Client, name: str) -> None:
    answer = http.post("/api/repos/create", json={"name": name, "organization": None, "type": "model"})
    assert answer.status_code == 400, answer.text
