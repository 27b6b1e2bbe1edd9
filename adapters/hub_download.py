"""Fetches a snapshot of a Hugging Face repo, failing in the project's own errors. Knows no kind of file."""

from pathlib import Path
from typing import Literal

from loractl.adapters.errors import NotAllowed, NotFound, RepoNotFound, RevisionNotFound, Unreachable


def fetch_snapshot(
    repo_id: str,
    *,
    typed: str,
    kind: Literal["model", "dataset"],
    revision: str | None,
    wanted: list[str],
    unwanted: list[str] | None = None,
    instead: str,
) -> Path:
    """The folder of a repo's files in the local cache, downloaded where they are not there.

    `typed` is what a person wrote for it, `instead` what could be written.

    Raises NotFound for what is no repo id, RepoNotFound, RevisionNotFound, NotAllowed (gated) or Unreachable.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                repo_id, repo_type=kind, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted
            )
        ).resolve()
    except HFValidationError as error:
        raise NotFound(f"not a {kind} of a hub: {typed!r}", hint=instead) from error
    except GatedRepoError as error:
        raise NotAllowed(
            f"{typed} is gated: its terms must be accepted first",
            hint=f"accept them on the page of {repo_id}, then set HF_TOKEN to a token of that account",
        ) from error
    except RevisionNotFoundError as error:
        raise RevisionNotFound(f"{typed} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise RepoNotFound(
            f"no {kind} {typed} in the hub", hint=f"{instead}; check the name; a private repo needs HF_TOKEN"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise Unreachable(
            f"{typed} is not in the local cache and the hub does not answer", hint=f"{instead}, or try again"
        ) from error
