"""An embedding is what PEFT's model makes of the last token: beside others, in chunks, and from a warm cache."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from engine_drive import Drive, adapter_use
from loractl.server.engine.base_model import load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.messages import RequestId, Sampling, Submit
from loractl.server.engine.settings import EngineSettings
from peft_oracle import alone
from tiny_models import make_adapter, make_tiny_base

PROMPT = tuple(range(60, 83))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture
def drive(base: Path) -> Iterator[Drive]:
    settings = EngineSettings(num_slots=2, max_rank=8, max_batch_tokens=8, max_running=4, block_size=4)
    drive = Drive(Engine(load_base(base, quantization="none", dtype="float32"), settings))
    yield drive
    drive.engine.close()


def _expected(base: Path, adapter: Path | None) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([PROMPT]), output_hidden_states=True, use_cache=False).hidden_states[-1]
    return torch.nn.functional.normalize(states[0, -1], dim=-1)


def test_embedding_equals_pefts_last_hidden_state_beside_others(base: Path, drive: Drive, tmp_path: Path) -> None:
    folder = make_adapter(base, tmp_path / "adapter")
    use = adapter_use(folder)
    words = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
    drive.submit(
        [
            Submit(id=RequestId("base"), prompt=PROMPT, sampling=Sampling(), wants_embedding=True),
            Submit(id=RequestId("words"), prompt=PROMPT, sampling=words, adapters=(use,)),
            Submit(id=RequestId("adapted"), prompt=PROMPT, sampling=Sampling(), adapters=(use,), wants_embedding=True),
        ]
    )
    drive.until_ended()
    drive.submit(
        [Submit(id=RequestId("again"), prompt=PROMPT, sampling=Sampling(), adapters=(use,), wants_embedding=True)]
    )
    drive.until_ended()
    expected = {"base": _expected(base, None), "adapted": _expected(base, folder)}
    assert (expected["base"] - expected["adapted"]).abs().max() > 1e-3
    for name, wanted in {**expected, "again": expected["adapted"]}.items():
        outcome = drive.outcomes[RequestId(name)]
        assert outcome.tokens == []
        assert outcome.finished.embedding is not None
        torch.testing.assert_close(torch.tensor(outcome.finished.embedding), wanted, atol=1e-5, rtol=1e-4)
        assert outcome.finished.num_output_tokens == 0
    assert drive.outcomes[RequestId("again")].finished.num_cached_tokens > 0
    words_outcome = drive.outcomes[RequestId("words")]
    assert words_outcome.ids == alone(base, folder, PROMPT, 12)[0]
    assert words_outcome.finished.embedding is None
