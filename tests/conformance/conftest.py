"""The hub under test, from HF_ENDPOINT and HF_TOKEN as any client has them, and repos of each check's own."""

import contextlib
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import HfApi, __version__

from hub_process import HubProcess, hub_process
from pushed_files import OpenHub, write_adapter

# Read before the fixture that gives every test a home of its own takes them away.
ENDPOINT = os.environ.get("HF_ENDPOINT", "")
TOKEN = os.environ.get("HF_TOKEN", "")


def pytest_report_header() -> str:
    xet = "without Xet" if os.environ.get("HF_HUB_DISABLE_XET") else "with Xet"
    return f"conformance of {ENDPOINT}: huggingface_hub {__version__} {xet}, Python {sys.version.split()[0]}"


@pytest.fixture
def endpoint() -> str:
    assert ENDPOINT, "set HF_ENDPOINT and HF_TOKEN, or use tests/support/run_conformance.py"
    return ENDPOINT


@pytest.fixture
def token() -> str:
    assert TOKEN, "set HF_TOKEN to a token that may do everything"
    return TOKEN


@pytest.fixture
def client_environment(endpoint: str, token: str, tmp_path: Path) -> dict[str, str]:
    """What a client in a process of its own is given: the endpoint, the token, and a home."""
    return dict(os.environ) | {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": token,
        "HF_HOME": str(tmp_path / "client-home"),
        "NO_COLOR": "1",
    }


@pytest.fixture
def api(endpoint: str, token: str) -> HfApi:
    return HfApi(endpoint=endpoint, token=token)


@pytest.fixture
def http(endpoint: str, token: str) -> Iterator[httpx.Client]:
    """The wire itself, where no client does what is to be seen."""
    with httpx.Client(base_url=endpoint, headers={"Authorization": f"Bearer {token}"}, timeout=60.0) as client:
        yield client


@pytest.fixture
def namespace() -> str:
    return f"check-{secrets.token_hex(5)}"


@pytest.fixture
def repo(api: HfApi, namespace: str) -> Iterator[str]:
    """An empty repo, removed afterwards."""
    repo_id = f"{namespace}/adapter"
    api.create_repo(repo_id)
    yield repo_id
    api.delete_repo(repo_id, missing_ok=True)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", seed=1)


@pytest.fixture
def other_adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "other-adapter", seed=2)


@pytest.fixture
def pushed(api: HfApi, repo: str, adapter: Path) -> str:
    """The repo after one push."""
    api.upload_folder(repo_id=repo, folder_path=adapter, commit_message="first")
    return repo


@pytest.fixture
def make_token(http: httpx.Client) -> Callable[..., str]:
    """Make a token by the hub's own call, and give its secret."""

    def make(*roles: str, pattern: str = "*", name: str = "checker") -> str:
        body = {"name": name, "roles": list(roles), "pattern": pattern}
        answer = http.post("/api/loractl/v1/tokens", json=body)
        assert answer.status_code == 201, answer.text
        secret: str = answer.json()["secret"]
        return secret

    return make


@pytest.fixture
def open_hub(tmp_path: Path) -> Iterator[OpenHub]:
    """A hub of the check's own, where it must be set up, stopped or wiped."""
    number = 0

    @contextlib.contextmanager
    def opened(**settings: Any) -> Iterator[HubProcess]:
        nonlocal number
        number += 1
        environment = {f"LORACTL_HUB_{name.upper()}": str(value) for name, value in settings.items()}
        # On SQLite and a folder in every combination: what these checks hold is not the store's.
        with hub_process(tmp_path / f"own-hub-{number}", environment) as running:
            yield running

    return opened  # type: ignore[return-value]
