"""Each family of decoders answers as transformers and PEFT do alone, in mixed batches with adapters on any linear."""

import gc
from pathlib import Path

import pytest
import torch
import transformers

from engine_drive import Drive, adapter_use
from loractl.adapters.errors import Unsupported
from loractl.server.engine.base_model import load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.messages import AdapterUse, RequestId, Sampling, Submit
from loractl.server.engine.model_shape import check_servable
from loractl.server.engine.settings import EngineSettings
from peft_oracle import alone
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
    uses: list[AdapterUse | None] = [None, *(adapter_use(f) for f in (every, some))]
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
        ids, logprobs, _ = alone(folder, None if use is None else use.folder, prompt, NUM_OUTPUT_TOKENS)
        outcome = drive.outcomes[RequestId(name)]
        assert outcome.ids == ids, f"{family} {name}"
        assert [token.logprob for token in outcome.tokens] == pytest.approx(logprobs, abs=1e-4), f"{family} {name}"
        answers.add(tuple(ids))
    assert len(answers) > len(PROMPTS)  # the adapters do something
    assert drive.engine.stats().counters.max_distinct_adapters_in_step == 2
    drive.engine.close()
    gc.collect()


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("BloomConfig", {"vocab_size": 384, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "ALiBi"),
        (
            "MixtralConfig",
            {
                "vocab_size": 384,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "num_local_experts": 2,
            },
            "experts",
        ),
        ("MambaConfig", {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}, "mamba"),
    ],
)
def test_base_that_packed_rows_cannot_carry_is_refused_by_name(
    name: str, settings: dict[str, object], named: str
) -> None:
    config = getattr(transformers, name)(**settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(Unsupported, match=named):
        check_servable(model)
