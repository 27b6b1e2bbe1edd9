"""Each family of decoders answers as transformers and PEFT do alone, in mixed batches with adapters on any linear."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from engine_drive import Drive
from loractl.adapters.base_loading import teach_layout
from loractl.adapters.digest import folder_digest
from loractl.server.engine.base_model import load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.messages import AdapterUse, RequestId, Sampling, Submit
from loractl.server.engine.settings import EngineSettings
from tiny_families import FAMILIES, make_family_base
from tiny_models import make_adapter

SETTINGS = EngineSettings(
    num_slots=3, max_rank=8, max_batch_tokens=24, max_running=12, block_size=4, kv_bytes=1 << 22, prefix_cache=True
)
NUM_OUTPUT_TOKENS = 8
PROMPTS = ((5, 9, 40, 41), tuple(range(30, 51)), (7,))
SOME_TARGETS = {
    "phi3": ["qkv_proj", "down_proj"],
    "gpt2": ["c_attn"],
    "gpt2-scaled": ["c_fc"],
    "gpt_neox": ["query_key_value"],
    "gpt_neox-serial": ["dense_h_to_4h"],
}


def _alone(folder: Path, use: AdapterUse | None, prompt: tuple[int, ...]) -> tuple[list[int], list[float]]:
    teach_layout(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if use is not None:
        model = PeftModel.from_pretrained(model, str(use.folder))
    model.eval()
    ids, logprobs = list(prompt), []
    for _ in range(NUM_OUTPUT_TOKENS):
        with torch.inference_mode():
            scores = torch.log_softmax(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1], -1)
        ids.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
    return ids[len(prompt) :], logprobs


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "baichuan", *FAMILIES])
def test_family_answers_as_peft_alone_in_a_mixed_batch(tmp_path: Path, family: str) -> None:
    folder = make_family_base(tmp_path / family, family)
    # GPT-2's Conv1D layers are written by PEFT with fan_in_fan_out set.
    extra = {"fan_in_fan_out": True} if family.startswith("gpt2") else {}
    every = make_adapter(
        folder, tmp_path / "every", target_modules="all-linear", std=0.1, r=8, lora_alpha=4, seed=1, **extra
    )
    some = make_adapter(
        folder, tmp_path / "some", target_modules=SOME_TARGETS.get(family, ["q_proj", "o_proj"]), seed=2, r=3, **extra
    )
    uses: list[AdapterUse | None] = [None, *(AdapterUse(digest=folder_digest(f), folder=f) for f in (every, some))]
    drive = Drive(Engine(load_base(folder, quantization="none", dtype="float32"), SETTINGS))
    cases = [(f"{i}-{j}", use, prompt) for i, use in enumerate(uses) for j, prompt in enumerate(PROMPTS)]
    drive.submit(
        Submit(
            id=RequestId(name),
            prompt=prompt,
            adapters=() if use is None else (use,),
            sampling=Sampling(max_tokens=NUM_OUTPUT_TOKENS, temperature=0.0, ignore_eos=True, num_logprobs=0),
        )
        for name, use, prompt in cases
    )
    drive.until_ended()
    answers = set()
    for name, use, prompt in cases:
        ids, logprobs = _alone(folder, use, prompt)
        outcome = drive.outcomes[RequestId(name)]
        assert outcome.ids == ids, f"{family} {name}"
        assert [token.logprob for token in outcome.tokens] == pytest.approx(logprobs, abs=1e-4), f"{family} {name}"
        answers.add(tuple(ids))
    assert len(answers) > len(PROMPTS)  # the adapters do something
    assert drive.engine.stats().counters.max_distinct_adapters_in_step == 2
    drive.engine.close()
    gc.collect()
