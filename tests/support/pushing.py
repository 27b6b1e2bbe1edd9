"""Pushes a folder by the stock client, as one commit. Knows no test."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd

from live_hub import LiveHub


def push(
    hub: LiveHub, folder: Path, repo: str = "team/name", *, channel: str = "main", token: str | None = None
) -> str:
    """Commit a folder's files to a channel, making the repo where it is new; the commit's id."""
    api = hub.api(token)
    api.create_repo(repo, exist_ok=True)
    files = [
        CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in folder.iterdir() if path.is_file()
    ]
    return str(api.create_commit(repo, operations=files, commit_message="push", revision=channel).oid)
