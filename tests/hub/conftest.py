"""A live hub and a small real adapter for the tests of the hub."""

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from live_hub import LiveHub, live_hub
from live_postgres import LivePostgres, live_postgres
from live_s3 import LiveS3, live_s3
from tiny_models import make_adapter, make_tiny_base


@pytest.fixture(autouse=True)
def stock_clients_upload_as_they_would() -> Iterator[None]:
    """Our own client settles for classic LFS, for its whole process; here others share it, before and after."""
    constants.HF_HUB_DISABLE_XET = False
    yield
    constants.HF_HUB_DISABLE_XET = False


@pytest.fixture(scope="session")
def postgres() -> Iterator[LivePostgres]:
    with live_postgres() as running:
        yield running


@pytest.fixture(scope="session")
def s3() -> Iterator[LiveS3]:
    with live_s3() as running:
        yield running


@pytest.fixture(params=["sqlite-folder", pytest.param("postgres-s3", marks=pytest.mark.slow)])
def hub(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[LiveHub]:
    """A live hub on what needs nothing installed, and again on what many processes share."""
    places: dict[str, Any] = {}
    if request.param == "postgres-s3":
        unique = f"hub-{secrets.token_hex(6)}"
        places["database_url"] = request.getfixturevalue("postgres").create_database(unique)
        places["blobs"] = request.getfixturevalue("s3").url(unique)
    with live_hub(tmp_path / "hub", **places) as running:
        yield running


@pytest.fixture
def folder_hub(tmp_path: Path) -> Iterator[LiveHub]:
    """A live hub on SQLite and a folder, for tests that look into them."""
    with live_hub(tmp_path / "hub") as running:
        yield running


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-base")


@pytest.fixture(scope="session")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_base, tmp_path_factory.mktemp("adapters") / "first", seed=1)


@pytest.fixture(scope="session")
def other_adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_base, tmp_path_factory.mktemp("adapters") / "second", seed=2)
