"""Where a base model comes from: a local folder, or a repo of a Hugging Face hub. Reads no weights, knows no torch."""

import re
from dataclasses import dataclass
from pathlib import Path

from loractl.adapters.errors import NotFound, UsageError
from loractl.adapters.hub_download import fetch_snapshot

# What a base needs: weights in safetensors, configs, tokenizer. Pickled weights and code are never fetched.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
_UNWANTED = ["*/*", "*.bin", "*.py", "*.pt", "*.gguf"]
_SNAPSHOT = re.compile(r"models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?$")


@dataclass(frozen=True, slots=True)
class BaseSource:
    """A base on the local disk: `id` names it for people and is never a path, `revision` is its commit, if any."""

    folder: Path
    id: str
    revision: str | None


def resolve_base(text: str, *, revision: str | None = None) -> BaseSource:
    """Find a base by folder or by hub repo id, downloading what is not in the Hugging Face cache.

    Raises NotFound, RepoNotFound, RevisionNotFound, NotAllowed (gated or private) or Unreachable.
    """
    folder = Path(text).expanduser()
    if folder.is_dir():
        return _from_folder(folder.resolve(), revision=revision)
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise NotFound(f"no such base folder: {text}", hint="give a folder in transformers' format, or a hub repo id")
    return _from_hub(text, revision=revision)


def _from_folder(folder: Path, *, revision: str | None) -> BaseSource:
    if revision is not None:
        raise UsageError(f"{folder.name} is a folder and has no revisions", hint="leave out --revision")
    if not (folder / "config.json").is_file():
        raise NotFound(f"{folder}: no config.json", hint="a base is a folder in transformers' format, or a hub repo id")
    snapshot = _SNAPSHOT.search(folder.as_posix())
    if snapshot:  # a folder of the Hugging Face cache tells its repo and commit by its place
        return BaseSource(folder, snapshot["repo"].replace("--", "/"), snapshot["commit"])
    return BaseSource(folder, folder.name, None)


def _from_hub(repo_id: str, *, revision: str | None) -> BaseSource:
    folder = fetch_snapshot(
        repo_id,
        typed=repo_id,
        kind="model",
        revision=revision,
        wanted=_WANTED,
        unwanted=_UNWANTED,
        instead="give a folder in transformers' format, or ORG/NAME",
    )
    return BaseSource(folder, repo_id, folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None)
