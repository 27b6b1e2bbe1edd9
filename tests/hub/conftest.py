"""A live hub and a small real adapter for the tests of the hub."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from live_hub import LiveHub, live_hub
from tiny_models import make_adapter, make_tiny_base


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LiveHub]:
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
