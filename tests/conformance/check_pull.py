"""Pull: all that a stock client reads of a repo, files and lists, and what it is told when something is missing."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import HfApi, __version__
from huggingface_hub.errors import (
    EntryNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from faulty_proxy import faulty_proxy
from pushed_files import write_adapter
from wire import file_line, folder_bytes, header_line, send_commit, sha256

WEIGHTS = "adapter_model.safetensors"
CLIENT = tuple(int(part) for part in __version__.split(".")[:3])


def test_model_info_has_what_clients_read(api: HfApi, pushed: str, adapter: Path) -> None:
    plain = api.model_info(pushed)
    assert plain.sha is not None
    assert len(plain.sha) == 40
    assert (plain.id, plain.author) == (pushed, pushed.partition("/")[0])
    assert (plain.private, plain.gated) == (False, False)
    assert plain.library_name == "peft"
    assert plain.last_modified is not None
    assert plain.created_at is not None
    assert {one.rfilename for one in plain.siblings or []} == set(folder_bytes(adapter))
    whole = api.model_info(pushed, revision=plain.sha, files_metadata=True)
    weights = next(one for one in whole.siblings or [] if one.rfilename == WEIGHTS)
    data = (adapter / WEIGHTS).read_bytes()
    assert weights.size == len(data)
    assert weights.lfs is not None
    assert weights.lfs["sha256"] == sha256(data)
    assert api.model_info(pushed, securityStatus=True).sha == plain.sha
    assert api.model_info(pushed, expand=["downloads", "tags"]).id == pushed


def test_existence_questions_are_answered(api: HfApi, pushed: str) -> None:
    assert api.repo_exists(pushed)
    assert not api.repo_exists(pushed + "-absent")
    assert api.revision_exists(pushed, "main")
    assert api.revision_exists(pushed, "v1")
    assert not api.revision_exists(pushed, "v9")
    assert api.file_exists(pushed, WEIGHTS)
    assert not api.file_exists(pushed, "adapter_model.bin")
    assert not api.file_exists(pushed + "-absent", WEIGHTS)
    assert not api.file_exists(pushed, WEIGHTS, revision="v9")


@pytest.mark.parametrize("revision", ["main", "v1", "refs/heads/main", "refs/tags/v1", None])
def test_snapshot_download_gives_the_same_bytes(
    api: HfApi, pushed: str, adapter: Path, tmp_path: Path, revision: str | None
) -> None:
    found = api.snapshot_download(pushed, revision=revision, cache_dir=tmp_path / "cache")
    assert folder_bytes(Path(found)) == folder_bytes(adapter)


def test_snapshot_of_a_commit_and_of_its_short_form(api: HfApi, pushed: str, adapter: Path, tmp_path: Path) -> None:
    sha = api.model_info(pushed).sha
    assert sha is not None
    assert api.model_info(pushed, revision=sha[:8]).sha == sha
    found = api.snapshot_download(pushed, revision=sha, cache_dir=tmp_path / "cache")
    assert Path(found).name == sha
    assert folder_bytes(Path(found)) == folder_bytes(adapter)


def test_second_snapshot_downloads_nothing(endpoint: str, token: str, pushed: str, tmp_path: Path) -> None:
    with faulty_proxy(endpoint) as proxy:
        api = HfApi(endpoint=proxy.url, token=token)
        api.snapshot_download(pushed, cache_dir=tmp_path / "cache")
        proxy.seen.clear()
        api.snapshot_download(pushed, cache_dir=tmp_path / "cache")
        assert [path for path in proxy.paths("GET") if "/resolve/" in path] == []


def test_download_to_a_folder_and_again(api: HfApi, pushed: str, adapter: Path, tmp_path: Path) -> None:
    for _ in range(2):
        api.snapshot_download(pushed, local_dir=tmp_path / "here")
    assert folder_bytes(tmp_path / "here") == folder_bytes(adapter)


def test_hf_hub_download_gives_one_file(api: HfApi, pushed: str, adapter: Path, tmp_path: Path) -> None:
    found = api.hf_hub_download(pushed, WEIGHTS, revision="v1", cache_dir=tmp_path / "cache")
    assert Path(found).read_bytes() == (adapter / WEIGHTS).read_bytes()
    # A weights file is kept under its sha256, which the client took from the ETag.
    assert Path(found).resolve().name == sha256((adapter / WEIGHTS).read_bytes())


def test_download_goes_on_where_it_was_cut(api: HfApi, endpoint: str, token: str, repo: str, tmp_path: Path) -> None:
    """T10: a cut connection is resumed by `Range`, not begun again; clients write down every 10 MiB."""
    folder = write_adapter(tmp_path / "large", size=400_000)
    api.upload_folder(repo_id=repo, folder_path=folder)
    with faulty_proxy(endpoint) as proxy:
        proxy.cut = (WEIGHTS, (10 << 20) + 50_000)
        client = HfApi(endpoint=proxy.url, token=token)
        try:
            found = client.hf_hub_download(repo, WEIGHTS, cache_dir=tmp_path / "cache")
        except OSError:
            # Before 1.0 the client goes on when it is asked again.
            found = client.hf_hub_download(repo, WEIGHTS, cache_dir=tmp_path / "cache")
        ranges = [(one.headers["range"], one.status) for one in proxy.seen if "range" in one.headers]
    assert Path(found).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert [status for _, status in ranges] == [206]
    assert int(ranges[0][0].removeprefix("bytes=").partition("-")[0]) >= 10 << 20


def test_tree_is_listed_whole_and_by_folder(api: HfApi, http: httpx.Client, repo: str) -> None:
    """T4: a folder in a folder, with its slash percent-encoded."""
    lines = [file_line(path, path.encode()) for path in ("a/b/c.txt", "a/d.txt", "e.txt")]
    assert send_commit(http, repo, header_line(), *lines).status_code == 200
    recursive = {one.path: type(one).__name__ for one in api.list_repo_tree(repo, recursive=True)}
    assert recursive == {
        "a": "RepoFolder",
        "a/b": "RepoFolder",
        "a/b/c.txt": "RepoFile",
        "a/d.txt": "RepoFile",
        "e.txt": "RepoFile",
    }
    assert {one.path for one in api.list_repo_tree(repo)} == {"a", "e.txt"}
    assert {one.path for one in api.list_repo_tree(repo, "a")} == {"a/b", "a/d.txt"}
    inner = list(api.list_repo_tree(repo, "a/b", expand=True))
    assert [one.path for one in inner] == ["a/b/c.txt"]
    assert inner[0].last_commit is not None
    assert http.get(f"/api/models/{repo}/tree/main/a%2Fb").json()[0]["path"] == "a/b/c.txt"
    # Xet hints in a tree would send clients to a store that is not there.
    assert "xetHash" not in http.get(f"/api/models/{repo}/tree/main?recursive=true&expand=true").text
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repo, "absent"))


def test_paths_info_leaves_out_what_is_absent(api: HfApi, http: httpx.Client, pushed: str, adapter: Path) -> None:
    found = {one.path: one for one in api.get_paths_info(pushed, [WEIGHTS, "absent.txt", "README.md"], expand=True)}
    assert set(found) == {WEIGHTS, "README.md"}
    weights = found[WEIGHTS]
    assert weights.lfs is not None  # type: ignore[union-attr]
    assert weights.lfs["sha256"] == sha256((adapter / WEIGHTS).read_bytes())  # type: ignore[union-attr]
    # The JavaScript client sends JSON where Python sends a form.
    answer = http.post(f"/api/models/{pushed}/paths-info/main", json={"paths": ["README.md"], "expand": False})
    assert [one["path"] for one in answer.json()] == ["README.md"]


def test_commits_are_listed_newest_first(api: HfApi, pushed: str) -> None:
    newest = api.upload_file(path_or_fileobj=b"x", path_in_repo="notes.txt", repo_id=pushed, commit_message="second")
    commits = api.list_repo_commits(pushed, formatted=True)
    assert [one.title for one in commits][:2] == ["second", "first"]
    assert commits[0].commit_id == newest.oid
    assert len(api.list_repo_commits(pushed, revision="v1")) == len(commits) - 1


@pytest.mark.parametrize("path", ["tree/main?recursive=true&limit=2", "commits/main?limit=1"])
def test_long_lists_lead_from_page_to_page(http: httpx.Client, api: HfApi, pushed: str, path: str) -> None:
    api.upload_file(path_or_fileobj=b"x", path_in_repo="folder/notes.txt", repo_id=pushed)
    whole = http.get(f"/api/models/{pushed}/{path.partition('limit=')[0]}").json()
    seen: list[Any] = []
    url: str | None = f"/api/models/{pushed}/{path}"
    while url is not None:
        answer = http.get(url)
        assert len(answer.json()) <= 2
        seen += answer.json()
        link = answer.links.get("next")
        url = None if link is None else link["url"]
    assert len(seen) >= 3
    assert seen == whole


@pytest.mark.parametrize(
    "name", ["with space.txt", "plus+.txt", "per%cent.txt", "ha#sh.txt", "ü-unicode-文.txt", "a b/c+d.txt"]
)
def test_file_of_an_awkward_name_makes_the_round(api: HfApi, repo: str, tmp_path: Path, name: str) -> None:
    """T5: space, plus, percent, hash, Unicode."""
    api.upload_file(path_or_fileobj=name.encode(), path_in_repo=name, repo_id=repo)
    assert name in api.list_repo_files(repo)
    assert api.file_exists(repo, name)
    assert Path(api.hf_hub_download(repo, name, cache_dir=tmp_path / "cache")).read_text() == name
    assert [one.path for one in api.get_paths_info(repo, [name])] == [name]


def test_missing_things_raise_the_clients_own_errors(api: HfApi, pushed: str, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(pushed + "-absent")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(pushed, revision="v9")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(pushed, "absent.json", cache_dir=tmp_path / "cache")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(pushed, WEIGHTS, revision="v9", cache_dir=tmp_path / "cache")
    with pytest.raises(RepositoryNotFoundError):
        api.snapshot_download(pushed + "-absent", cache_dir=tmp_path / "cache")
    # T6: with the commit on the answer, the client remembers that the file is not there.
    assert list((tmp_path / "cache").rglob(".no_exist/*/absent.json"))


def test_missing_file_names_the_commit(http: httpx.Client, api: HfApi, pushed: str) -> None:
    """T6."""
    answer = http.head(f"/{pushed}/resolve/main/absent.json")
    assert (answer.status_code, answer.headers["x-error-code"]) == (404, "EntryNotFound")
    assert answer.headers["x-repo-commit"] == api.model_info(pushed).sha


def test_bare_401_and_404_carry_the_code(endpoint: str, http: httpx.Client, pushed: str) -> None:
    """T7: over plain http the client maps a 401 by this header alone."""
    missing = http.get(f"/api/models/{pushed}-absent")
    assert (missing.status_code, missing.headers["x-error-code"]) == (404, "RepoNotFound")
    nobody = httpx.get(f"{endpoint}/api/models/{pushed}-absent")
    assert nobody.status_code in {401, 404}
    assert nobody.headers["x-error-code"] == "RepoNotFound"
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=endpoint, token=False).model_info(pushed + "-absent")


def test_private_repo_answers_strangers_as_if_missing(
    api: HfApi, endpoint: str, namespace: str, make_token: Callable[..., str], adapter: Path
) -> None:
    """T8: status, headers and text are those of a repo that is not there, on every way in."""
    private, absent = f"{namespace}/hidden", f"{namespace}/nobody"
    api.create_repo(private, private=True)
    api.upload_folder(repo_id=private, folder_path=adapter)
    stranger = httpx.Client(
        base_url=endpoint, headers={"Authorization": f"Bearer {make_token('read', 'write', pattern='other-*/*')}"}
    )
    with stranger:
        for method, path in (
            ("GET", "/api/models/{}"),
            ("GET", "/api/models/{}/tree/main"),
            ("GET", "/api/models/{}/refs"),
            ("GET", "/api/models/{}/auth-check"),
            ("GET", "/api/models/{}/xet-write-token/main"),
            ("HEAD", "/{}/resolve/main/adapter_model.safetensors"),
            ("GET", "/{}/resolve/main/adapter_model.safetensors"),
            ("POST", "/api/models/{}/commit/main"),
        ):
            hidden, missing = (stranger.request(method, path.format(repo)) for repo in (private, absent))
            told = [
                (
                    answer.status_code,
                    answer.headers.get("x-error-code"),
                    answer.text.replace("hidden", "nobody").replace(answer.headers["x-request-id"], ""),
                )
                for answer in (hidden, missing)
            ]
            assert told[0] == told[1]
            assert told[0][:2] == (404, "RepoNotFound")
        batch = {"objects": [{"oid": "0" * 64, "size": 1}]}
        for method, path, body in (
            ("POST", "/api/models/{}/preupload/main", {"files": []}),
            ("POST", "/api/models/{}/paths-info/main", {"paths": []}),
            ("POST", "/{}.git/info/lfs/objects/batch", batch),
            ("POST", "/{}.git/info/lfs/objects/verify", batch["objects"][0]),
            ("POST", "/api/models/{}/branch/x", {}),
            ("DELETE", "/api/models/{}/branch/main", {}),
            ("POST", "/api/models/{}/tag/main", {"tag": "x"}),
            ("DELETE", "/api/models/{}/tag/v1", {}),
            ("PUT", "/api/models/{}/settings", {"private": False}),
            ("DELETE", "/api/repos/delete", {"name": "{}"}),
        ):
            answers = [
                stranger.request(
                    method,
                    path.format(repo),
                    content=json.dumps(body).replace("{}", repo),
                    headers={"Content-Type": "application/json"},
                )
                for repo in (private, absent)
            ]
            assert [(one.status_code, one.headers.get("x-error-code")) for one in answers] == [
                (404, "RepoNotFound")
            ] * 2, path
        assert stranger.get("/api/models", params={"author": namespace}).json() == []
    assert api.model_info(private).private is True
    api.delete_repo(private)


def test_head_is_exact_and_empty(http: httpx.Client, api: HfApi, pushed: str, adapter: Path) -> None:
    """T9: all metadata on HEAD, and exactly those of the bytes that GET sends."""
    for name, data in folder_bytes(adapter).items():
        answer = http.head(f"/{pushed}/resolve/main/{name}", headers={"Accept-Encoding": "identity"})
        assert answer.status_code == 200
        assert answer.content == b""
        assert answer.headers["x-repo-commit"] == api.model_info(pushed).sha
        assert answer.headers["etag"].startswith('"')
        assert "content-encoding" not in answer.headers
        assert int(answer.headers["content-length"]) == len(data)
        assert answer.headers["accept-ranges"] == "bytes"
        if name == WEIGHTS:
            assert answer.headers["x-linked-etag"] == f'"{sha256(data)}"'
            assert int(answer.headers["x-linked-size"]) == len(data)
        # Xet hints would send clients to a store that is not there.
        assert "x-xet-hash" not in answer.headers
        assert "xet-auth" not in answer.headers.get("link", "")


def test_download_never_leads_to_another_host(http: httpx.Client, pushed: str, adapter: Path) -> None:
    """T11: this hub sends every byte itself, so no client has to leave its token behind or trust a second address."""
    for name, data in folder_bytes(adapter).items():
        answer = http.get(f"/{pushed}/resolve/main/{name}", follow_redirects=False)
        assert (answer.status_code, answer.content) == (200, data)
        assert "location" not in answer.headers


@pytest.mark.parametrize(
    ("span", "status", "part"),
    [
        ("bytes=0-9", 206, slice(0, 10)),
        ("bytes=1000-", 206, slice(1000, None)),
        ("bytes=-17", 206, slice(-17, None)),
        ("bytes=999999999-", 416, slice(0, 0)),
    ],
)
def test_range_gives_these_bytes(
    http: httpx.Client, pushed: str, adapter: Path, span: str, status: int, part: slice
) -> None:
    """T10."""
    data = (adapter / WEIGHTS).read_bytes()
    answer = http.get(f"/{pushed}/resolve/main/{WEIGHTS}", headers={"Range": span}, follow_redirects=True)
    assert (answer.status_code, answer.content) == (status, data[part])
    if status == 206:
        start, stop, _ = part.indices(len(data))
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(data)}"


def test_safetensors_headers_are_read_by_range(api: HfApi, pushed: str) -> None:
    found = api.parse_safetensors_file_metadata(pushed, WEIGHTS)
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in found.tensors)
    with pytest.raises(NotASafetensorsRepoError):
        api.get_safetensors_metadata(pushed)


def test_lists_filter_by_author_text_and_tag(api: HfApi, pushed: str, namespace: str) -> None:
    assert [one.id for one in api.list_models(author=namespace)] == [pushed]
    assert pushed in [one.id for one in api.list_models(search=namespace)]
    for tag in ("peft", "lora", "base_model:org/base", "base_model:adapter:org/base", "license:mit"):
        assert [one.id for one in api.list_models(author=namespace, filter=tag)] == [pushed], tag
    assert [one.id for one in api.list_models(author=namespace, filter=["peft", "lora"])] == [pushed]
    assert list(api.list_models(author=namespace, filter=["peft", "license:apache-2.0"])) == []
    full = next(iter(api.list_models(author=namespace, full=True)))
    assert WEIGHTS in {one.rfilename for one in full.siblings or []}
    assert [one.id for one in api.list_models(author=namespace, cardData=True)] == [pushed]


def test_lists_are_sorted_as_asked(http: httpx.Client, api: HfApi, pushed: str, namespace: str, tmp_path: Path) -> None:
    api.create_repo(f"{namespace}/younger")
    api.hf_hub_download(pushed, WEIGHTS, cache_dir=tmp_path / "cache")

    def first(sort: str) -> str:
        answer = http.get("/api/models", params={"author": namespace, "sort": sort, "limit": 1})
        return str(answer.json()[0]["id"])

    for name in ("lastModified", "createdAt", "likes", "trendingScore", "last_modified", "created_at"):
        assert first(name) == f"{namespace}/younger", name
    assert first("downloads") == pushed
    assert api.model_info(pushed).downloads == 1
    assert http.get("/api/models", params={"sort": "colour"}).status_code == 400
    api.delete_repo(f"{namespace}/younger")


def test_pages_neither_repeat_nor_skip_while_repos_come(api: HfApi, http: httpx.Client, namespace: str) -> None:
    """T24: the cursor is a place, not a count."""
    names = [f"{namespace}/r{number}" for number in range(5)]
    for name in names:
        api.create_repo(name)
        time.sleep(0.002)
    seen: list[str] = []
    url: str | None = f"/api/models?author={namespace}&limit=2"
    while url is not None:
        answer = http.get(url)
        seen += [one["id"] for one in answer.json()]
        api.create_repo(f"{namespace}/later-{len(seen)}")
        link = answer.links.get("next")
        url = None if link is None else link["url"]
        assert len(seen) < 20
    assert [one for one in seen if "later" not in one] == names[::-1]
    assert len(seen) == len(set(seen))
    assert {one.id for one in api.list_models(author=namespace, limit=3)} < {
        one.id for one in api.list_models(author=namespace)
    }
    for found in list(api.list_models(author=namespace)):
        api.delete_repo(found.id)


@pytest.mark.skipif(CLIENT < (1, 0, 0), reason="huggingface_hub before 1.0 does not repeat a download after 429")
def test_download_waits_and_asks_again_when_told_so(endpoint: str, token: str, pushed: str, tmp_path: Path) -> None:
    """T21, the client's half: the header by which the hub says when."""
    with faulty_proxy(endpoint) as proxy:
        proxy.refuse = ("/resolve/", 429, {"Retry-After": "1"})
        api = HfApi(endpoint=proxy.url, token=token)
        assert Path(api.hf_hub_download(pushed, "README.md", cache_dir=tmp_path / "cache")).is_file()
        assert proxy.refuse is None


def test_yanked_version_warns_and_still_answers(http: httpx.Client, api: HfApi, pushed: str, tmp_path: Path) -> None:
    """T22: the header by which stock clients tell their users."""
    body = {"revision": "v1", "reason": "wrong labels"}
    assert http.post(f"/api/loractl/v1/adapters/{pushed}/yank", json=body).status_code == 200
    for path in (f"/api/models/{pushed}/revision/v1", f"/{pushed}/resolve/v1/README.md"):
        answer = http.get(path)
        assert answer.status_code == 200
        assert answer.headers["x-hf-warning"].startswith("yanked; ")
        assert "wrong labels" in answer.headers["x-hf-warning"]
    assert api.snapshot_download(pushed, revision="v1", cache_dir=tmp_path / "cache")


def test_card_data_reaches_the_client(api: HfApi, pushed: str) -> None:
    info = api.model_info(pushed)
    assert info.card_data is not None
    assert info.card_data["base_model"] == "org/base"
