"""The protocol's checks, run for the oldest and the newest client on both kinds of hub; `make conformance` runs all."""

from pathlib import Path

import pytest

from run_conformance import CATEGORIES, NEWEST, OLDEST, Combination, run_combination

_OUT = Path(__file__).parent.parent.parent / "build" / "conformance"
# PEFT and transformers are the same on every backend, and slow to start.
_ON_SHARED_STORES = tuple(category for category in CATEGORIES if category != "loaders")


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("one", "categories"),
    [
        (Combination(OLDEST, xet=True, backend="sqlite"), CATEGORIES),
        (Combination(NEWEST, xet=True, backend="sqlite"), CATEGORIES),
        (Combination(OLDEST, xet=True, backend="postgres-s3"), _ON_SHARED_STORES),
        (Combination(NEWEST, xet=True, backend="postgres-s3"), _ON_SHARED_STORES),
    ],
    ids=str,
)
def test_clients_find_what_they_expect(one: Combination, categories: tuple[str, ...]) -> None:
    assert run_combination(one, junit=_OUT / f"{one}.xml", categories=categories) == 0
