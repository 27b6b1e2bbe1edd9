"""Refs: branches and tags as stock clients make, list and delete them, and which names they may have."""

import httpx
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from wire import status_of


def test_tags_come_and_go(api: HfApi, pushed: str) -> None:
    sha = api.model_info(pushed).sha
    api.create_tag(pushed, tag="release-1", tag_message="good")
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_tag(pushed, tag="release-1")
    assert status_of(refused.value) == 409
    api.create_tag(pushed, tag="release-1", exist_ok=True)
    api.create_tag(pushed, tag="rel/2026.11", revision="v1")
    tags = {one.name: one.target_commit for one in api.list_repo_refs(pushed).tags}
    assert tags == {"v1": sha, "release-1": sha, "rel/2026.11": sha}
    assert api.model_info(pushed, revision="rel/2026.11").sha == sha
    for tag in ("release-1", "rel/2026.11"):
        api.delete_tag(pushed, tag=tag)
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag(pushed, tag="release-1")
    with pytest.raises(RevisionNotFoundError):
        api.create_tag(pushed, tag="x-1", revision="absent")


def test_branches_come_and_go(api: HfApi, pushed: str) -> None:
    """T3: with a slash, and one that looks like two parts of a path."""
    sha = api.model_info(pushed).sha
    empty = api.list_repo_commits(pushed)[-1].commit_id
    api.create_branch(pushed, branch="exp/1")
    api.create_branch(pushed, branch="exp", revision=empty)
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_branch(pushed, branch="exp/1")
    assert status_of(refused.value) == 409
    api.create_branch(pushed, branch="exp/1", exist_ok=True)
    branches = {one.name: (one.ref, one.target_commit) for one in api.list_repo_refs(pushed).branches}
    assert branches["exp/1"] == ("refs/heads/exp/1", sha)
    assert branches["exp"] == ("refs/heads/exp", empty)
    assert api.file_exists(pushed, "README.md", revision="exp/1")
    # `resolve/exp/1/x` would be the file `1/x` of the branch `exp`; the encoded slash must not become one.
    assert not api.file_exists(pushed, "1/README.md", revision="exp")
    for branch in ("exp/1", "exp"):
        api.delete_branch(pushed, branch=branch)
    assert [one.name for one in api.list_repo_refs(pushed).branches] == ["main"]


def test_main_and_versions_stay(api: HfApi, pushed: str) -> None:
    with pytest.raises(HfHubHTTPError) as branch:
        api.delete_branch(pushed, branch="main")
    with pytest.raises(HfHubHTTPError) as tag:
        api.delete_tag(pushed, tag="v1")
    assert (status_of(branch.value), status_of(tag.value)) == (400, 403)
    assert api.model_info(pushed, revision="v1").sha == api.model_info(pushed).sha


def test_tag_and_branch_never_share_a_name(api: HfApi, pushed: str) -> None:
    """T25."""
    api.create_branch(pushed, branch="one-name")
    with pytest.raises(HfHubHTTPError) as tag:
        api.create_tag(pushed, tag="one-name")
    api.create_tag(pushed, tag="other-name")
    with pytest.raises(HfHubHTTPError) as branch:
        api.create_branch(pushed, branch="other-name")
    assert (status_of(tag.value), status_of(branch.value)) == (409, 409)


@pytest.mark.parametrize(
    "name", ["v7", "0123456789abcdef", "refs/heads/x", "a..b", "a b", "-a", "a.lock", "a//b", "ü", "x" * 201]
)
def test_name_that_could_be_read_another_way_is_refused(http: httpx.Client, pushed: str, name: str) -> None:
    quoted = httpx.QueryParams({"n": name})["n"]
    path = "".join(f"%{byte:02X}" for byte in quoted.encode())
    assert http.post(f"/api/models/{pushed}/branch/{path}", json={}).status_code == 400
    assert http.post(f"/api/models/{pushed}/tag/main", json={"tag": name}).status_code == 400


def test_history_is_not_rewritten(http: httpx.Client, api: HfApi, pushed: str) -> None:
    with pytest.raises(HfHubHTTPError) as refused:
        api.super_squash_history(pushed)
    assert status_of(refused.value) == 501
    answer = http.post(f"/api/models/{pushed}/lfs-files/batch", json={})
    assert (answer.status_code, "not supported" in answer.headers["x-error-message"]) == (501, True)


def test_refs_with_pull_requests_asked_for_are_listed(api: HfApi, pushed: str) -> None:
    refs = api.list_repo_refs(pushed, include_pull_requests=True)
    assert (refs.converts, refs.pull_requests) == ([], [])


def test_revision_is_found_by_every_way_of_writing_it(http: httpx.Client, api: HfApi, pushed: str) -> None:
    """Branch, tag, both in full, a commit and a part of it that is long enough; nothing else, and no pull request."""
    sha = api.model_info(pushed).sha
    assert sha is not None
    for revision in ("main", "v1", "refs%2Fheads%2Fmain", "refs%2Ftags%2Fv1", sha, sha[:7]):
        assert http.get(f"/api/models/{pushed}/revision/{revision}").json()["sha"] == sha, revision
    for revision in (sha[:6], "refs%2Fpr%2F1", "refs%2Fheads%2Fv1", "HEAD"):
        answer = http.get(f"/api/models/{pushed}/revision/{revision}")
        assert (answer.status_code, answer.headers["x-error-code"]) == (404, "RevisionNotFound"), revision
