"""An engine takes no more than the memory there is, says what it chose, and does as it is told where it is told."""

import logging
from pathlib import Path
from typing import Any

import pytest

from loractl.adapters.errors import WillNotFit
from loractl.adapters.host_memory import FreeMemory
from loractl.server.engine.base_model import BaseModel, load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.settings import EngineSettings
from loractl.server.engine.sizing import choose_size
from tiny_families import make_family_base
from tiny_models import make_tiny_base

SMALL: dict[str, Any] = {"max_rank": 8, "max_running": 4, "block_size": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base(make_tiny_base(tmp_path_factory.mktemp("sizes") / "base"), quantization="none", dtype="float32")


def _free(size_bytes: int) -> FreeMemory:
    return FreeMemory(size_bytes, "the container's memory.max")


def test_slots_and_kv_grow_with_what_is_free_and_stay_within_their_share(base: BaseModel) -> None:
    settings = EngineSettings(**SMALL)
    sizes = [choose_size(base, settings, host=_free(size)) for size in (1 << 20, 4 << 20, 1 << 34)]
    for size in sizes[:2]:
        taken = size.num_slots * size.slot_bytes + size.num_blocks * size.block_bytes
        assert 0.3 * size.free.size_bytes < taken <= 0.5 * size.free.size_bytes
    assert sizes[0].num_slots < sizes[1].num_slots < sizes[2].num_slots == 32
    assert sizes[0].num_blocks < sizes[2].num_blocks == 4 * (512 // 4 + 1)  # more than that no batch fills
    assert [size.host_cache_bytes for size in sizes] == [1 << 17, 1 << 19, 2 << 30]


def test_what_an_operator_says_counts_whatever_is_free(base: BaseModel) -> None:
    settings = EngineSettings(num_slots=40, kv_bytes=1 << 18, host_cache_bytes=7, **SMALL)
    size = choose_size(base, settings, host=_free(1 << 16))
    assert (size.num_slots, size.host_cache_bytes) == (40, 7)
    assert size.num_blocks == (1 << 18) // size.block_bytes


def test_too_little_for_one_slot_or_block_is_refused_with_what_to_change(base: BaseModel) -> None:
    with pytest.raises(WillNotFit, match="a slot takes") as refused:
        choose_size(base, EngineSettings(**SMALL), host=_free(100_000))
    assert "--max-rank" in (refused.value.hint or "")
    with pytest.raises(WillNotFit, match="are there for the KV cache"):
        choose_size(base, EngineSettings(num_slots=4, **SMALL), host=_free(100_000))
    with pytest.raises(WillNotFit, match=r"^0 bytes are there for the KV cache"):
        choose_size(base, EngineSettings(num_slots=1_000_000, **SMALL), host=_free(100_000))
    with pytest.raises(WillNotFit, match=r"^10 bytes are there for the KV cache") as refused:
        choose_size(base, EngineSettings(num_slots=1, kv_bytes=10, **SMALL), host=_free(1 << 30))
    assert refused.value.hint == "a larger --kv-bytes"


def test_engine_in_a_small_container_says_at_its_start_what_it_took_and_why(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("loractl.server.engine.sizing.free_memory", lambda: _free(2 << 20))
    with caplog.at_level(logging.INFO):
        engine = Engine(base, EngineSettings(**SMALL))
    stats = engine.stats()
    assert f"room for {stats.num_slots} adapters of rank 8" in caplog.text
    assert f"{stats.kv_blocks_total} KV blocks" in caplog.text
    assert "2 MiB were free by the container's memory.max" in caplog.text
    assert 0 < stats.num_slots < 32
    engine.close()


@pytest.mark.parametrize(
    ("family", "quantization"), [("llama", "int8"), ("llama", "nf4"), ("gpt2", "none"), ("gpt_neox", "none")]
)
def test_slot_is_as_large_as_was_counted(tmp_path: Path, family: str, quantization: Any) -> None:
    base = load_base(make_family_base(tmp_path / "base", family), quantization=quantization, dtype="float32")
    for _ in range(2):  # the second engine finds the layers replaced
        engine = Engine(base, EngineSettings(num_slots=3, kv_bytes=1 << 20, **SMALL))
        assert engine._slots._slab.nbytes == 3 * engine.size.slot_bytes
        engine.close()
