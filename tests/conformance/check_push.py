"""Push: every way in which a stock client sends files, and every way in which a hostile or broken one does."""

import base64
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, __version__
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from faulty_proxy import faulty_proxy
from pushed_files import OpenHub, write_adapter
from wire import commits_of, file_line, folder_bytes, header_line, lfs_line, offer, send_commit, sha256, status_of

WEIGHTS = "adapter_model.safetensors"
CLIENT = tuple(int(part) for part in __version__.split(".")[:3])

_PUSH = """
import sys
from huggingface_hub import HfApi
folder, repo = sys.argv[1:]
api = HfApi()
api.create_repo(repo, exist_ok=True)
print(api.upload_folder(folder_path=folder, repo_id=repo).oid)
"""


def test_upload_folder_arrives_whole_in_one_commit(api: HfApi, http: httpx.Client, repo: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "large", size=100_000)
    done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="all", commit_description="why")
    assert len(commits_of(http, repo)) == 2
    assert api.model_info(repo).sha == done.oid
    found = api.snapshot_download(repo, cache_dir=tmp_path / "cache")
    assert folder_bytes(Path(found)) == folder_bytes(folder)


def test_push_again_sends_nothing_and_commits_nothing(
    endpoint: str, client_environment: dict[str, str], http: httpx.Client, repo: str, adapter: Path
) -> None:
    """T12: the first answer tells the client that all is there."""
    first = _run(client_environment, _PUSH, str(adapter), repo)
    with faulty_proxy(endpoint) as proxy:
        again = _run(client_environment | {"HF_ENDPOINT": proxy.url}, _PUSH, str(adapter), repo)
        assert proxy.paths("PUT") == []
        # A client with Xet packs its weights again, since no session knows of another; it does not commit them.
        if "HF_HUB_DISABLE_XET" in os.environ or CLIENT < (1, 20, 0):
            assert not [path for path in proxy.paths("POST") if "/xet/" in path]
    assert again == first
    assert len(commits_of(http, repo)) == 2


def test_single_files_are_added_replaced_and_deleted(api: HfApi, pushed: str, tmp_path: Path) -> None:
    api.upload_file(path_or_fileobj=b"one", path_in_repo="notes/a.txt", repo_id=pushed)
    api.upload_file(path_or_fileobj=b"two", path_in_repo="notes/a.txt", repo_id=pushed)
    assert Path(api.hf_hub_download(pushed, "notes/a.txt", cache_dir=tmp_path / "c")).read_text() == "two"
    api.delete_file("notes/a.txt", repo_id=pushed)
    assert not api.file_exists(pushed, "notes/a.txt")
    api.upload_file(path_or_fileobj=b"", path_in_repo="notes/empty.txt", repo_id=pushed)
    assert Path(api.hf_hub_download(pushed, "notes/empty.txt", cache_dir=tmp_path / "c")).read_bytes() == b""
    api.delete_folder("notes", repo_id=pushed)
    assert not any(name.startswith("notes/") for name in api.list_repo_files(pushed))
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("notes/a.txt", repo_id=pushed)


def test_one_commit_adds_copies_and_deletes(api: HfApi, pushed: str, other_adapter: Path, tmp_path: Path) -> None:
    before = (other_adapter / WEIGHTS).read_bytes()
    api.create_commit(
        pushed,
        operations=[
            CommitOperationAdd("second/adapter_config.json", (other_adapter / "adapter_config.json").read_bytes()),
            CommitOperationAdd(f"second/{WEIGHTS}", before),
            CommitOperationDelete("README.md"),
        ],
        commit_message="mixed",
    )
    api.create_commit(
        pushed,
        operations=[CommitOperationCopy(src_path_in_repo=f"second/{WEIGHTS}", path_in_repo=f"third/{WEIGHTS}")],
        commit_message="copied on the server",
    )
    assert Path(api.hf_hub_download(pushed, f"third/{WEIGHTS}", cache_dir=tmp_path / "c")).read_bytes() == before
    assert not api.file_exists(pushed, "README.md")


def test_push_in_the_background_and_by_patterns(api: HfApi, repo: str, adapter: Path) -> None:
    (adapter / "trainer_state.json").write_text("{}")
    future = api.upload_folder(repo_id=repo, folder_path=adapter, ignore_patterns="trainer_*", run_as_future=True)
    assert future.result(timeout=60).oid
    assert set(api.list_repo_files(repo)) == {"README.md", "adapter_config.json", WEIGHTS}
    api.upload_folder(repo_id=repo, folder_path=adapter, allow_patterns="*.md", delete_patterns="*.md")
    assert "README.md" in api.list_repo_files(repo)


def test_push_to_a_branch_leaves_main_alone(api: HfApi, pushed: str, other_adapter: Path) -> None:
    """T3: a branch with a slash through preupload, upload, commit and download."""
    main = api.model_info(pushed).sha
    api.create_branch(pushed, branch="exp/1")
    done = api.upload_folder(repo_id=pushed, folder_path=other_adapter, revision="exp/1")
    assert api.model_info(pushed, revision="exp/1").sha == done.oid
    assert api.model_info(pushed).sha == main


def test_stale_parent_is_refused(api: HfApi, pushed: str) -> None:
    """T13."""
    parent = api.model_info(pushed).sha
    add = [CommitOperationAdd("notes.txt", b"1")]
    api.create_commit(pushed, operations=add, commit_message="first", parent_commit=parent)
    with pytest.raises(HfHubHTTPError) as refused:
        add = [CommitOperationAdd("notes.txt", b"2")]
        api.create_commit(pushed, operations=add, commit_message="second", parent_commit=parent)
    assert status_of(refused.value) == 412


def test_commit_to_a_branch_that_is_not_there_says_so(http: httpx.Client, repo: str) -> None:
    answer = send_commit(http, repo, header_line(), file_line("a.txt", b"x"), revision="absent")
    assert (answer.status_code, answer.headers["x-error-code"]) == (404, "RevisionNotFound")


def test_of_two_racing_commits_one_is_refused(endpoint: str, token: str, http: httpx.Client, pushed: str) -> None:
    """T13."""
    parent = commits_of(http, pushed)[0]
    codes: list[int] = []

    def commit(number: int) -> None:
        with httpx.Client(base_url=endpoint, headers=http.headers, timeout=60.0) as client:
            lines = (header_line(parentCommit=parent), file_line(f"n{number}.txt", b"x%d" % number))
            codes.append(send_commit(client, pushed, *lines).status_code)

    threads = [threading.Thread(target=commit, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [200, 412, 412, 412]
    assert len(commits_of(http, pushed)) == 3


def test_lost_answer_to_a_commit_makes_one_commit(
    endpoint: str, client_environment: dict[str, str], http: httpx.Client, repo: str, adapter: Path
) -> None:
    """T19: the hub has committed, the client hears 502 and asks again."""
    with faulty_proxy(endpoint) as proxy:
        proxy.lose = "/commit/main"
        environment = client_environment | {"HF_ENDPOINT": proxy.url}
        # Clients that do not repeat a commit by themselves are run again by their people.
        command = [sys.executable, "-c", _PUSH, str(adapter), repo]
        subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
        assert proxy.lose is None
        oid = _run(environment, _PUSH, str(adapter), repo)
    assert commits_of(http, repo)[0] == oid
    assert len(commits_of(http, repo)) == 2


def test_blob_of_another_repo_cannot_be_named(
    api: HfApi, http: httpx.Client, repo: str, namespace: str, adapter: Path
) -> None:
    """T14: neither an absent blob nor one that only another repo has; the two answers are the same."""
    api.create_repo(f"{namespace}/other", private=True)
    api.upload_folder(repo_id=f"{namespace}/other", folder_path=adapter)
    foreign, absent = sha256((adapter / WEIGHTS).read_bytes()), sha256(b"nobody has this")
    told = []
    for oid in (foreign, absent):
        answer = send_commit(http, repo, header_line(), lfs_line(WEIGHTS, oid))
        told.append((answer.status_code, answer.json()["error"].replace(oid, "OID")))
    assert told[0] == told[1]
    assert told[0][0] == 400
    # The offer of an upload is no oracle either.
    assert "actions" in offer(http, repo, (adapter / WEIGHTS).read_bytes())
    api.delete_repo(f"{namespace}/other")


def test_upload_address_is_good_for_one_object_of_one_repo(http: httpx.Client, repo: str) -> None:
    """T15: another object, another size, other bytes, another repo; and it may be used again for the same bytes."""
    data = b"exactly these bytes"
    href = offer(http, repo, data)["actions"]["upload"]["href"]
    assert httpx.put(href, content=b"other bytes, same n").status_code == 400
    assert httpx.put(href, content=data + b"more").status_code in {400, 403, 413}
    assert httpx.put(href, content=data[:-1]).status_code == 400
    other = sha256(b"another object")
    assert httpx.put(href.replace(sha256(data), other), content=b"another object").status_code == 403
    assert httpx.put(href.replace(f"size={len(data)}", "size=5"), content=b"bytes").status_code == 403
    changed = href.replace("/lfs/", "/lfs/9", 1)
    assert httpx.put(changed, content=data).status_code == 403
    assert send_commit(http, repo, header_line(), lfs_line("a.txt", sha256(data))).status_code == 400
    for _ in range(2):
        assert httpx.put(href, content=data).status_code == 200
    assert send_commit(http, repo, header_line(), lfs_line("a.txt", sha256(data))).status_code == 200
    assert "actions" not in offer(http, repo, data)


def test_offer_of_uploads_is_one_that_old_clients_take(http: httpx.Client, repo: str) -> None:
    """The way is never Xet's, an object that is too large has its reason, and only uploads of sha256 are offered."""
    place = f"/{repo}.git/info/lfs/objects/batch"
    body = {"operation": "upload", "transfers": ["basic", "multipart", "xet"], "hash_algo": "sha256"}
    good, large = (
        http.post(place, json=body | {"objects": [{"oid": "a" * 64, "size": size}]}).json() for size in (5, 1 << 60)
    )
    assert {good["transfer"], large["transfer"]} <= {"basic", "multipart"}
    assert set(good["objects"][0]["actions"]) == {"upload", "verify"}
    assert "actions" not in large["objects"][0]
    assert large["objects"][0]["error"]["code"] == 413
    assert "over the limit" in large["objects"][0]["error"]["message"]
    for other in ({"operation": "download"}, {"hash_algo": "md5"}, {"objects": [{"oid": "A" * 64, "size": 5}]}):
        assert http.post(place, json={"objects": []} | body | other).status_code == 400


def test_busy_hub_is_asked_again(
    endpoint: str, client_environment: dict[str, str], http: httpx.Client, repo: str, adapter: Path
) -> None:
    """T21, the other half: an upload that hears 503 and `Retry-After` is repeated by the client and arrives."""
    uses_xet = "HF_HUB_DISABLE_XET" not in os.environ and CLIENT >= (1, 20, 0)
    with faulty_proxy(endpoint) as proxy:
        proxy.refuse = ("/xet/" if uses_xet else "signature=", 503, {"Retry-After": "1"})
        oid = _run(client_environment | {"HF_ENDPOINT": proxy.url}, _PUSH, str(adapter), repo)
        assert proxy.refuse is None
    assert commits_of(http, repo)[0] == oid


def test_upload_address_expires(open_hub: OpenHub) -> None:
    """T15."""
    with open_hub(upload_ttl_s=0) as hub, _client(hub.url, hub.admin) as http:
        http.post("/api/repos/create", json={"name": "adapter", "organization": "team"})
        href = offer(http, "team/adapter", b"late")["actions"]["upload"]["href"]
        assert httpx.put(href, content=b"late").status_code == 403


def test_verify_tells_whether_an_object_arrived(http: httpx.Client, repo: str) -> None:
    """T17."""
    data = b"to be verified"
    actions = offer(http, repo, data)["actions"]
    wanted = {"oid": sha256(data), "size": len(data)}
    assert http.post(actions["verify"]["href"], json=wanted).status_code == 404
    assert httpx.put(actions["upload"]["href"], content=data).status_code == 200
    assert http.post(actions["verify"]["href"], json=wanted).status_code == 200
    assert http.post(actions["verify"]["href"], json=wanted | {"size": 3}).status_code == 404


def _client(url: str, token: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60.0)


_IN_PARTS: dict[str, Any] = {"multipart_threshold_bytes": 1_000_000, "multipart_chunk_bytes": 400_000}


def test_upload_in_parts_arrives_whole(open_hub: OpenHub, client_environment: dict[str, str], tmp_path: Path) -> None:
    """T16, the good way, by the client itself."""
    folder = write_adapter(tmp_path / "large", size=100_000)
    with open_hub(**_IN_PARTS) as hub, faulty_proxy(hub.url) as proxy:
        more = {"HF_ENDPOINT": proxy.url, "HF_TOKEN": hub.admin, "HF_HUB_DISABLE_XET": "1"}
        _run(client_environment | more, _PUSH, str(folder), "team/parts")
        assert len([path for path in proxy.paths("PUT") if "/parts/" in path]) == 9
        found = HfApi(endpoint=hub.url, token=hub.admin).snapshot_download("team/parts", cache_dir=tmp_path / "c")
        assert folder_bytes(Path(found)) == folder_bytes(folder)


def test_parts_missing_twice_or_wrong_are_refused(open_hub: OpenHub) -> None:
    """T16: missing, doubled, out of order, of another length, and a whole of another hash."""
    data = os.urandom(1_200_001)
    with open_hub(**_IN_PARTS) as hub, _client(hub.url, hub.admin) as http:
        http.post("/api/repos/create", json={"name": "adapter", "organization": "team"})
        upload = offer(http, "team/adapter", data)["actions"]["upload"]
        chunk = int(upload["header"]["chunk_size"])
        urls = {int(name): url for name, url in upload["header"].items() if name.isdigit()}
        parts = {number: data[(number - 1) * chunk : number * chunk] for number in urls}
        assert len(parts) == 4

        def complete(numbers: list[int]) -> int:
            named = [{"partNumber": number, "etag": '"x"'} for number in numbers]
            return httpx.post(upload["href"], json={"oid": sha256(data), "parts": named}).status_code

        assert httpx.put(urls[4], content=parts[1]).status_code in {400, 413}
        # Out of order is no harm: each part has its own address.
        for number in (3, 1, 2):
            assert "etag" in httpx.put(urls[number], content=parts[number]).headers
        assert complete([1, 2, 3, 4]) == 400
        assert complete([1, 2, 3]) == 400
        assert complete([1, 1, 2, 3]) == 400
        httpx.put(urls[4], content=bytes(len(parts[4]) - 1) + b"x")
        assert complete([1, 2, 3, 4]) == 400
        httpx.put(urls[4], content=parts[4])
        assert complete([4, 3, 2, 1]) in {200, 400}
        # Clients repeat what they heard no answer to.
        assert [complete([1, 2, 3, 4]) for _ in range(2)] == [200, 200]
        assert send_commit(http, "team/adapter", header_line(), lfs_line("a.dat", sha256(data))).status_code == 200


def test_hub_may_restart_between_upload_and_commit(open_hub: OpenHub) -> None:
    """T28: what was acknowledged is there after a kill."""
    data = os.urandom(100_000)
    with open_hub() as hub, _client(hub.url, hub.admin) as http:
        http.post("/api/repos/create", json={"name": "adapter", "organization": "team"})
        href = offer(http, "team/adapter", data)["actions"]["upload"]["href"]
        assert httpx.put(href, content=data).status_code == 200
        hub.restart()
        # The address from before the restart is still good, as the key that signed it is kept.
        assert httpx.put(href, content=data).status_code == 200
        answer = send_commit(http, "team/adapter", header_line(), lfs_line("a.dat", sha256(data)))
        assert answer.status_code == 200, answer.text


def test_quota_is_told_before_anything_is_sent(
    open_hub: OpenHub, client_environment: dict[str, str], tmp_path: Path
) -> None:
    """T23: the text reaches the person who typed `hf upload`."""
    folder = write_adapter(tmp_path / "large", size=100_000)
    with open_hub(namespace_quota_bytes=1_000_000) as hub, faulty_proxy(hub.url) as proxy:
        environment = client_environment | {"HF_ENDPOINT": proxy.url, "HF_TOKEN": hub.admin}
        program = "from huggingface_hub.cli.hf import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", program, "upload", "team/adapter", str(folder)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode != 0
        assert "team uses 0 of its 1,000,000 bytes" in done.stdout + done.stderr
        assert not [path for path in proxy.paths("POST") + proxy.paths("PUT") if "/xet/" in path or "/lfs/" in path]


def test_wiped_hub_gets_everything_again(
    open_hub: OpenHub, client_environment: dict[str, str], tmp_path: Path, adapter: Path
) -> None:
    """T18: a client that has pushed here before keeps no belief about what the hub still has."""
    for _ in range(2):
        with open_hub() as hub:
            _run(client_environment | {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.admin}, _PUSH, str(adapter), "team/a")
            found = HfApi(endpoint=hub.url, token=hub.admin).snapshot_download(
                "team/a", cache_dir=tmp_path / hub.root.name
            )
            assert folder_bytes(Path(found)) == folder_bytes(adapter)


def _run(environment: dict[str, str], program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_xet_session_is_bound_to_its_repo(http: httpx.Client, api: HfApi, repo: str, namespace: str) -> None:
    """T18: another address at each request, a token that is good for one repo, and no other route."""
    api.create_repo(f"{namespace}/second")
    first, again = (http.get(f"/api/models/{repo}/xet-write-token/main").json() for _ in range(2))
    other = http.get(f"/api/models/{namespace}/second/xet-write-token/main").json()
    assert len({first["casUrl"], again["casUrl"], other["casUrl"]}) == 3
    xorb = "a" * 64

    def put(session: dict[str, Any], token: str) -> int:
        headers = {"Authorization": f"Bearer {token}"}
        return httpx.post(
            f"{session['casUrl']}/v1/xorbs/default/{xorb}", content=_xorb(b"x"), headers=headers
        ).status_code

    assert put(first, other["accessToken"]) == 403
    assert put(first, "nonsense") == 403
    assert put(first, again["accessToken"]) == 200
    assert put(first, first["accessToken"]) == 200
    headers = {"Authorization": f"Bearer {first['accessToken']}"}
    for method, path in (
        ("GET", f"v1/chunks/default/{xorb}"),
        ("POST", "v2/shards"),
        ("GET", f"v1/reconstructions/{xorb}"),
        ("POST", f"v1/xorb-grants/default/{xorb}"),
    ):
        assert httpx.request(method, f"{first['casUrl']}/{path}", headers=headers).status_code == 404
    # Older readers of the answer look at its headers.
    answer = http.get(f"/api/models/{repo}/xet-write-token/main")
    told = answer.json()
    assert answer.headers["x-xet-cas-url"] == told["casUrl"]
    assert answer.headers["x-xet-access-token"] == told["accessToken"]
    assert int(answer.headers["x-xet-token-expiration"]) == told["exp"] > time.time() + 60
    assert http.get(f"/api/models/{repo}/xet-write-token/main?create_pr=1").status_code == 400
    assert http.get(f"/api/models/{repo}/xet-write-token/absent").headers["x-error-code"] == "RevisionNotFound"
    # Nothing is ever read by Xet here.
    assert http.get(f"/api/models/{repo}/xet-read-token/main").status_code == 404
    api.delete_repo(f"{namespace}/second")


def _xorb(*chunks: bytes) -> bytes:
    return b"".join(
        b"\0" + len(data).to_bytes(3, "little") + b"\0" + len(data).to_bytes(3, "little") + data for data in chunks
    )


def _shard(xorb: str, data: bytes, *, sha: str | None = None, end: int = 1, num_bytes: int | None = None) -> bytes:
    """A shard of one file made of chunks 0..end of one xorb."""

    def packed(text: str) -> bytes:
        return b"".join(int(text[at : at + 16], 16).to_bytes(8, "little") for at in range(0, 64, 16))

    def numbers(*values: int) -> bytes:
        return b"".join(value.to_bytes(4, "little") for value in values)

    head = packed("1" * 64) + numbers(1 << 30, 1) + bytes(8)
    segment = packed(xorb) + numbers(0, len(data) if num_bytes is None else num_bytes, 0, end)
    metadata = packed(sha or sha256(data)) + bytes(16)
    return bytes(48) + head + segment + metadata + b"\xff" * 32 + bytes(16)


def test_xet_pieces_that_do_not_fit_are_refused(http: httpx.Client, repo: str) -> None:
    """T18: broken xorbs, shards that name what was not sent, other bytes than announced."""
    session = http.get(f"/api/models/{repo}/xet-write-token/main").json()
    headers = {"Authorization": f"Bearer {session['accessToken']}"}
    xorb, data = "b" * 64, b"the file's bytes"

    def post(path: str, content: bytes) -> int:
        return httpx.post(f"{session['casUrl']}/{path}", content=content, headers=headers, timeout=60.0).status_code

    place = f"v1/xorbs/default/{xorb}"
    sound = _xorb(data)
    bomb = b"\0" + (4).to_bytes(3, "little") + b"\1" + (0xFFFFFF).to_bytes(3, "little") + b"abcd"
    for broken in (b"", sound[:-1], b"\7" + sound[1:], sound[:4] + b"\x09" + sound[5:], bomb, _xorb(b"") * 9000):
        assert post(place, broken) == 400
    assert post("v1/xorbs/default/../../../etc/passwd", sound) in {400, 404}
    assert post("v1/xorbs/default/%2e%2e%2fescape", sound) == 400
    assert post("v1/shards", _shard("c" * 64, data)) == 400
    # Some clients end a xorb with its footer.
    assert post(place, sound + b"XETBLOB" + bytes(40)) == 200
    assert post(place, sound) == 200
    for wrong in (
        b"",
        _shard(xorb, data)[:100],
        _shard(xorb, data, sha=sha256(b"other")),
        _shard(xorb, data, end=7),
        _shard(xorb, data, num_bytes=5),
        _shard(xorb, data)[:84] + b"\xff\xff\xff\x7f" + _shard(xorb, data)[88:],
    ):
        assert post("v1/shards", wrong) == 400
    assert send_commit(http, repo, header_line(), lfs_line("a.txt", sha256(data))).status_code == 400
    assert post("v1/shards", _shard(xorb, data)) == 200
    assert send_commit(http, repo, header_line(), lfs_line("a.txt", sha256(data))).status_code == 200


_FILE = file_line("a.txt", b"hello")


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ((), 400),
        (("{\n",), 400),
        ((_FILE,), 400),
        ((header_line(), header_line()), 400),
        ((header_line(), '{"key":"surprise","value":{}}\n'), 400),
        ((header_line(), '{"value":{}}\n'), 400),
        ((header_line(), "[]\n"), 400),
        ((header_line(), "null\n"), 400),
        ((header_line(), '"text"\n'), 400),
        ((header_line(), '{"key":"file","value":[]}\n'), 400),
        ((header_line(), '{"key":"file","value":{"path":7,"content":"aGk="}}\n'), 400),
        ((header_line(), '{"key":"file","value":{"path":"a.txt"}}\n'), 400),
        ((header_line(), '{"key":"file","value":{"path":"a.txt","content":"a===","encoding":"base64"}}\n'), 400),
        ((header_line(), '{"key":"file","value":{"path":"a.txt","content":"ö","encoding":"base64"}}\n'), 400),
        ((header_line(), '{"key":"file","value":{"path":"a.txt","content":"aGk=","encoding":"hex"}}\n'), 400),
        ((header_line(), _FILE, _FILE), 400),
        ((header_line(), _FILE, '{"key":"deletedFile","value":{"path":"a.txt"}}\n'), 400),
        ((header_line(), '{"key":"deletedFile","value":{"path":"absent.txt"}}\n'), 404),
        ((header_line(), '{"key":"deletedFolder","value":{"path":"absent"}}\n'), 404),
        ((header_line(), lfs_line("a.txt", "zz")), 400),
        ((header_line(), lfs_line("a.txt", "0" * 64, size=-1)), 400),
        ((header_line(), _FILE[: len(_FILE) // 2]), 400),
        ((header_line(), '{"key":' + "[" * 200_000 + "\n"), 400),
        ((header_line(), '{"key":"file","value":' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "}\n"), 400),
        ((header_line(), *(['{"key":"deletedFile","value":{"path":"a.txt"}}\n'] * 4000)), 413),
        ((header_line(), file_line("a.txt", bytes(2 << 20))), 413),
    ],
)
def test_body_that_is_no_commit_changes_nothing(
    http: httpx.Client, repo: str, lines: tuple[str, ...], status: int
) -> None:
    """T20."""
    before = commits_of(http, repo)
    answer = send_commit(http, repo, *lines)
    assert answer.status_code == status, answer.text[:500]
    assert answer.json()["error"]
    assert commits_of(http, repo) == before


def test_commit_of_too_many_files_changes_nothing(open_hub: OpenHub) -> None:
    """T20."""
    with open_hub(max_files_per_repo=3) as hub, _client(hub.url, hub.admin) as http:
        http.post("/api/repos/create", json={"name": "adapter", "organization": "team"})
        before = commits_of(http, "team/adapter")
        for num_files, status in ((4, 413), (3, 200)):
            lines = [file_line(f"f{number}.txt", b"x") for number in range(num_files)]
            assert send_commit(http, "team/adapter", header_line(), *lines).status_code == status
            assert (commits_of(http, "team/adapter") == before) == (status == 413)


def test_endless_line_is_refused(http: httpx.Client, repo: str) -> None:
    """T20: 200 MB in one line, and the hub goes on."""

    def endless() -> Any:
        yield header_line().encode()
        yield b'{"key":"file","value":{"path":"a.txt","content":"'
        for _ in range(200):
            yield b"A" * (1 << 20)

    try:
        answer = http.post(f"/api/models/{repo}/commit/main", content=endless())
    except httpx.TransportError:
        # The hub has answered and closed while the client was still sending.
        pass
    else:
        assert answer.status_code == 413
    assert http.get(f"/api/models/{repo}").status_code == 200


_WRONG_PATHS = [
    *("../x.txt", "/etc/passwd", "a/../../x", "a\\b.txt", ".git/config", "a\x00b", "a\nb", "CON.txt"),
    *("e\u0301.txt", "a//b", "a/", "x" * 256, "/".join(["d" * 200] * 6)),
]


@pytest.mark.parametrize("path", _WRONG_PATHS)
def test_path_that_leads_elsewhere_is_refused(http: httpx.Client, repo: str, path: str) -> None:
    before = commits_of(http, repo)
    body = {"files": [{"path": path, "size": 1, "sample": base64.b64encode(b"x").decode()}]}
    refused = http.post(f"/api/models/{repo}/preupload/main", json=body)
    assert (refused.status_code, "E_PATH" in refused.json()["error"]) == (400, True)
    answer = send_commit(http, repo, header_line(), file_line(path, b"x"))
    assert (answer.status_code, "E_PATH" in answer.json()["error"]) == (400, True)
    assert commits_of(http, repo) == before


def test_preupload_says_how_each_file_travels(http: httpx.Client, pushed: str, adapter: Path) -> None:
    files = [
        {"path": name, "size": len(data), "sample": base64.b64encode(data[:512]).decode()}
        for name, data in folder_bytes(adapter).items()
    ]
    files.append({"path": "empty.txt", "size": 0, "sample": ""})
    answer = http.post(
        f"/api/models/{pushed}/preupload/main", json={"files": files, "gitAttributes": "", "gitIgnore": ""}
    )
    modes = {one["path"]: (one["uploadMode"], one.get("oid")) for one in answer.json()["files"]}
    assert modes[WEIGHTS] == ("lfs", sha256((adapter / WEIGHTS).read_bytes()))
    assert modes["adapter_config.json"][0] == "regular"
    assert len(modes["adapter_config.json"][1] or "") == 40
    assert modes["empty.txt"] == ("regular", None)
    refused = http.post(f"/api/models/{pushed}/preupload/main?create_pr=1", json={"files": files})
    assert refused.status_code == 400
    assert "pull requests" in json.dumps(refused.json())


def test_reader_may_not_push(endpoint: str, pushed: str, other_adapter: Path, make_token: Callable[..., str]) -> None:
    with pytest.raises(HfHubHTTPError) as refused:
        HfApi(endpoint=endpoint, token=make_token("read")).upload_folder(repo_id=pushed, folder_path=other_adapter)
    assert status_of(refused.value) == 403
    headers = {"Authorization": f"Bearer {make_token('read')}"}
    answer = httpx.get(f"{endpoint}/api/models/{pushed}/xet-write-token/main", headers=headers)
    assert (answer.status_code, answer.headers["x-error-message"]) == (403, answer.json()["error"].partition(" (")[0])
