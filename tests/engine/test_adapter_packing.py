"""What the compiled call puts into a slot is, to the bit, what reading tensor by tensor puts there."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loractl.adapters.errors import AdapterInvalid
from loractl.server.engine.adapter_packing import PackPlan
from loractl.server.engine.adapter_reading import AdapterReader
from loractl.server.engine.base_model import load_base
from loractl.server.engine.kernels import native
from loractl.server.engine.runner import Runner
from tiny_models import make_adapter, make_tiny_base

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiler, or a processor without AVX-512 VNNI")

FORMATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _reader(base: Path, dtype: torch.dtype) -> AdapterReader:
    runner = Runner(load_base(base, quantization="int8"), num_blocks=2, block_size=4)
    return AdapterReader(runner.layers, max_rank=21, truncate_rank=False, dtype=dtype)


def _rows(reader: AdapterReader, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Up to each rank, what both ways of reading leave in a slot."""
    packed = [reader.read(folder), reader.read(folder)]  # by a plan just made, and by one that was kept
    with monkeypatch.context() as patched:
        patched.setattr(PackPlan, "build", lambda pairs: None)
        plain = AdapterReader(reader._layers, max_rank=21, truncate_rank=False, dtype=reader._dtype).read(folder)
    assert all(host.ranks == plain.ranks for host in packed)
    rows = []
    for host in (plain, *packed):
        sites = reader.carve(host.row[None])
        parts = [(sites[name].a[0, :rank], sites[name].b[0, :, :rank]) for name, rank in plain.ranks.items()]
        rows.append(torch.cat([part.flatten() for pair in parts for part in pair]))
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", FORMATS)
def test_packed_slots_equal_those_read_tensor_by_tensor(
    tmp_path: Path, stored: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_tiny_base(tmp_path / "base", hidden_size=40, intermediate_size=76)
    reader = _reader(base, dtype)
    for rank in (5, 21):
        folder = make_adapter(base, tmp_path / f"{rank}", r=rank, lora_alpha=7, target_modules="all-linear")
        file = folder / "adapter_model.safetensors"
        save_file({name: tensor.to(FORMATS[stored]) for name, tensor in load_file(file).items()}, file)
        plain, *packed = _rows(reader, folder, monkeypatch)
        assert plain.abs().sum() > 0
        assert all(torch.equal(plain, row) for row in packed)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, 3.4e38])
def test_a_number_that_is_not_finite_in_the_slot_is_refused(tmp_path: Path, bad: float) -> None:
    base = make_tiny_base(tmp_path / "base")
    reader = _reader(base, torch.bfloat16)
    folder = make_adapter(base, tmp_path / "adapter", r=4, target_modules="all-linear")
    file = folder / "adapter_model.safetensors"
    good = load_file(file)
    reader.read(folder)
    for name in (min(good), max(good)):
        tensors = {key: tensor.clone() for key, tensor in good.items()}
        tensors[name].view(-1)[-1] = bad
        save_file(tensors, file)
        with pytest.raises(AdapterInvalid, match="NaN or infinity"):
            reader.read(folder)


def test_a_plan_is_kept_for_equal_files_alone(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base")
    reader = _reader(base, torch.bfloat16)
    first = make_adapter(base, tmp_path / "first", r=4, target_modules=["q_proj"])
    other = make_adapter(base, tmp_path / "other", r=4, lora_alpha=64, target_modules=["q_proj"])
    plans = [reader._open(folder)[1] for folder in (first, first, other)]
    assert plans[0] is plans[1]
    assert plans[2] is not plans[0]
