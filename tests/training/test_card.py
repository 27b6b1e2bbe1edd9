"""The card that a run writes says what a hub asks of a card."""

from loractl.adapters.manifest import BasePin, DataRecord, Manifest
from loractl.adapters.training.saving import card
from loractl.adapters.validation.config_checks import check_card


def test_card_of_a_run_lacks_nothing_that_the_checks_ask_for() -> None:
    manifest = Manifest(
        base=BasePin(id="tiny", fingerprint="sha256:" + "0" * 64),
        data=DataRecord(digest="sha256:" + "1" * 64, num_rows=3, files=["rows.jsonl"]),
        rank=4,
        targets=["q_proj"],
        num_trainable_parameters=10,
    )
    text = card(manifest)
    assert list(check_card(text, path="README.md")) == []
    assert 'license: "unknown"' in text
    assert 'datasets: ["rows.jsonl"]' in text
