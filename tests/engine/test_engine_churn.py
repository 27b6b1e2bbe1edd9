"""Many adapters through few slots, with new content under old names: no row is ever another's. PEFT is the oracle."""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine_drive import Drive, adapter_use
from loractl.server.engine.base_model import load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.messages import AdapterUse, RequestId, Sampling, Submit
from loractl.server.engine.settings import EngineSettings
from tiny_models import make_adapter, make_tiny_base

pytestmark = [pytest.mark.drill, pytest.mark.slow]

LONG = os.environ.get("LORACTL_DRILLS") == "long"
NUM_REQUESTS, NUM_NAMES = (10_000, 64) if LONG else (200, 64)
PROMPTS = [(5, 9, 40, 41), (100, 3, 250, 17, 88, 21, 60), (7,)]
NUM_TOKENS = 4


class Contents:
    """Adapters that differ in their numbers alone, each with what PEFT says of it."""

    def __init__(self, root: Path) -> None:
        base = make_tiny_base(root / "base")
        self.base = base
        self._root = root
        self._first = make_adapter(base, root / "first")
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self._peft = PeftModel.from_pretrained(model, str(self._first)).eval()
        self._number = 0

    def new(self) -> tuple[AdapterUse, list[list[int]]]:
        """One more adapter, and the greedy tokens after each prompt."""
        self._number += 1
        folder = self._root / f"content{self._number}"
        shutil.copytree(self._first, folder)
        generator = torch.Generator().manual_seed(self._number)
        state = load_file(folder / "adapter_model.safetensors")
        state = {name: torch.empty_like(tensor).normal_(std=0.2, generator=generator) for name, tensor in state.items()}
        save_file(state, folder / "adapter_model.safetensors")
        set_peft_model_state_dict(self._peft, state)
        return adapter_use(folder), [self._greedy(prompt) for prompt in PROMPTS]

    @torch.inference_mode()
    def _greedy(self, prompt: tuple[int, ...]) -> list[int]:
        ids = list(prompt)
        for _ in range(NUM_TOKENS):
            ids.append(int(self._peft(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]


def test_no_row_is_wrong_when_64_adapters_with_reloads_pass_through_4_slots(tmp_path: Path) -> None:
    contents = Contents(tmp_path)
    current = [contents.new() for _ in range(NUM_NAMES)]
    assert len({tuple(map(tuple, tokens)) for _, tokens in current}) == NUM_NAMES
    settings = EngineSettings(
        num_slots=4, max_rank=4, max_running=16, max_batch_tokens=24, block_size=4, kv_bytes=1 << 19, max_queue=64
    )
    drive = Drive(Engine(load_base(contents.base, quantization="none", dtype="float32"), settings))
    chance = random.Random(7)
    weights = [1 / (rank + 1) for rank in range(NUM_NAMES)]
    num_reloads = 0
    for start in range(0, NUM_REQUESTS, 50):
        expected: dict[RequestId, list[int]] = {}
        for place in range(start, min(start + 50, NUM_REQUESTS)):
            (name,) = chance.choices(range(NUM_NAMES), weights if chance.random() < 0.7 else None)
            if chance.random() < 0.05:
                old = current[name][0]
                current[name] = contents.new()
                num_reloads += 1
                if chance.random() < 0.5:
                    drive.engine.unload(old.digest)
            use, tokens = current[name]
            prompt = chance.randrange(len(PROMPTS))
            request = Submit(
                id=RequestId(f"r{place}"),
                prompt=PROMPTS[prompt],
                sampling=Sampling(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True),
                adapters=(use,),
                tenant=chance.choice("ab"),
            )
            expected[request.id] = tokens[prompt]
            drive.submit([request])
            if chance.random() < 0.3:
                drive.once()
        drive.until_ended(timeout_s=300)
        num_wrong = sum(drive.outcomes[name].ids != tokens for name, tokens in expected.items())
        assert num_wrong == 0, f"after {start} requests"
        drive.outcomes.clear()
    counters = drive.engine.stats().counters
    print(
        f"\nchurn requests={NUM_REQUESTS} reloads={num_reloads} loads={counters.num_adapter_loads} "
        f"evictions={counters.num_adapter_evictions} wrong=0"
    )
    assert counters.num_adapter_evictions > 20
    assert counters.max_distinct_adapters_in_step > 1
    drive.engine.close()
