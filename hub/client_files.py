"""Files between a folder and any hub of the Hugging Face protocol, by huggingface_hub. Knows no route of our own."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from loractl.adapters.digest import CARD_FILE, CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, adapter_digest, file_sha256
from loractl.adapters.errors import RevisionNotFound
from loractl.adapters.manifest import load_manifest
from loractl.adapters.reference import DEFAULT_REVISION, AdapterRef
from loractl.hub import client_errors
from loractl.hub.client_records import ResolvedAdapter
from loractl.hub.client_session import prepare_huggingface

_ADAPTER_FILES = [CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE, CARD_FILE]


def hf_api(endpoint: str, token: str | None) -> Any:
    """The stock client, as this person at this hub."""
    from huggingface_hub import HfApi

    prepare_huggingface()
    # False: a token that this person has for another hub must not go to this one.
    return HfApi(endpoint=endpoint, token=token or False, library_name="loractl")


def download(api: Any, repo_id: str, commit: str, folder: Path) -> None:
    """Put an adapter's files into a folder."""
    with client_errors.translated(api.endpoint, about=repo_id):
        api.snapshot_download(repo_id, revision=commit, local_dir=folder, allow_patterns=_ADAPTER_FILES, max_workers=4)
    # Bookkeeping of the download, of no use in a folder that never changes.
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def make_channel(api: Any, ref: AdapterRef, channel: str, *, private: bool) -> str | None:
    """Return the commit that the channel points at before the push."""
    api.create_repo(ref.repo_id, private=private or None, exist_ok=True)
    if channel != DEFAULT_REVISION:
        api.create_branch(ref.repo_id, branch=channel, exist_ok=True)
    refs = api.list_repo_refs(ref.repo_id)
    return next((str(branch.target_commit) for branch in refs.branches if branch.name == channel), None)


def additions(folder: Path) -> dict[str, Any]:
    """What a folder's files are to a commit, by name; each is hashed here, once."""
    from huggingface_hub import CommitOperationAdd

    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in names.items()}


def commit(api: Any, files: dict[str, Any], ref: AdapterRef, channel: str, *, parent: str | None, message: str) -> str:
    """Make a channel hold exactly these files; the commit's id."""
    from huggingface_hub import CommitOperationDelete

    operations: list[Any] = list(files.values())
    present = api.list_repo_files(ref.repo_id, revision=channel) if parent else []
    gone = sorted(set(present) - files.keys() - {".gitattributes"})
    operations += [CommitOperationDelete(path_in_repo=name) for name in gone]
    made = api.create_commit(ref.repo_id, operations, commit_message=message, revision=channel, parent_commit=parent)
    return str(made.oid)


def resolve_by_files(api: Any, ref: AdapterRef) -> ResolvedAdapter:
    """Resolve by the general protocol, on a hub that knows no digests: from the weights' hash and the config."""
    with client_errors.translated(api.endpoint, about=str(ref)), tempfile.TemporaryDirectory() as work:
        info = api.model_info(ref.repo_id, revision=ref.revision, files_metadata=True)
        files = {file.rfilename: file for file in info.siblings or []}
        weights = files.get(WEIGHTS_FILE)
        if weights is None or weights.lfs is None or CONFIG_FILE not in files:
            raise RevisionNotFound(f"{ref} holds no {CONFIG_FILE} with {WEIGHTS_FILE}")
        for name in {CONFIG_FILE, MANIFEST_FILE} & files.keys():
            api.hf_hub_download(ref.repo_id, name, revision=info.sha, local_dir=work)
        manifest = load_manifest(Path(work))
        digest = adapter_digest(config_sha256=file_sha256(Path(work) / CONFIG_FILE), weights_sha256=weights.lfs.sha256)
    pin = manifest.base if manifest is not None else None
    return ResolvedAdapter(
        repo_id=ref.repo_id,
        revision=ref.revision,
        commit=str(info.sha),
        digest=digest,
        version=None,
        base_id=pin.id if pin else None,
        base_fingerprint=pin.fingerprint if pin else None,
        rank=manifest.rank if manifest else None,
        size_bytes=sum(file.size or 0 for file in files.values()),
    )
