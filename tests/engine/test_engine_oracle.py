"""Mixed batches of base and adapters against PEFT alone: the same greedy tokens, the same log probabilities."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from demo_assets import demo_base
from engine_drive import Drive
from loractl.adapters.digest import folder_digest
from loractl.server.engine.base_model import load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.messages import AdapterUse, RequestId, Sampling, Submit
from loractl.server.engine.settings import EngineSettings
from tiny_models import make_adapter, make_tiny_base

ADAPTERS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": "all-linear"},
    {"r": 3, "lora_alpha": 8, "target_modules": ["o_proj", "down_proj"], "rank_pattern": {"down_proj": 6}},
]
PROMPTS = [
    (5, 9, 200, 31, 7),
    (44, 45, 46),
    tuple(range(100, 140)),
    (60, 61),
    (300, 4, 301, 5, 302, 6, 303),
]
NUM_OUTPUTS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    root = tmp_path_factory.mktemp("oracle")
    base = make_tiny_base(root / "base")
    return base, [make_adapter(base, root / f"a{seed}", seed=seed, **kind) for seed, kind in enumerate(ADAPTERS)]


def _use(folder: Path, *, weight: float = 1.0) -> AdapterUse:
    return AdapterUse(digest=folder_digest(folder), folder=folder, weight=weight)


def _alone(base: Path, adapter: Path | None, prompt: tuple[int, ...]) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log probabilities from transformers and PEFT, one prompt, no cache, no batch."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    ids, logprobs = list(prompt), []
    with torch.inference_mode():
        for _ in range(NUM_OUTPUTS):
            last = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], dim=-1)
            ids.append(int(last.argmax()))
            logprobs.append(float(last.max()))
    return ids[len(prompt) :], logprobs


@pytest.mark.parametrize("max_batch_tokens", [8, 512])
def test_engine_rows_equal_peft_alone_when_base_and_adapters_share_steps(
    folders: tuple[Path, list[Path]], max_batch_tokens: int
) -> None:
    base, adapters = folders
    settings = EngineSettings(
        num_slots=4, max_rank=8, max_running=8, max_batch_tokens=max_batch_tokens, block_size=4, kv_bytes=1 << 20
    )
    engine = Engine(load_base(base, quantization="none", dtype="float32"), settings)
    drive = Drive(engine)
    owners = [None, *adapters]
    cases = {RequestId(f"{i}-{j}"): (o, p) for i, o in enumerate(owners) for j, p in enumerate(PROMPTS[:2])}
    cases |= {RequestId(f"{i}-long"): (o, PROMPTS[2]) for i, o in enumerate(owners)}
    greedy = Sampling(max_tokens=NUM_OUTPUTS, temperature=0.0, ignore_eos=True, num_logprobs=0)
    drive.submit(
        Submit(id=name, prompt=prompt, sampling=greedy, adapters=() if owner is None else (_use(owner),))
        for name, (owner, prompt) in cases.items()
    )
    drive.until_ended()
    for name, (owner, prompt) in cases.items():
        tokens, logprobs = _alone(base, owner, prompt)
        assert drive.outcomes[name].ids == tokens, name
        assert [token.logprob for token in drive.outcomes[name].tokens] == pytest.approx(logprobs, abs=1e-4), name
    assert max(record.num_distinct_adapters for record in drive.records) == len(adapters)
    engine.close()


def test_engine_row_equals_peft_weighted_sum_when_a_request_mixes_two_adapters(
    folders: tuple[Path, list[Path]],
) -> None:
    base, adapters = folders
    engine = Engine(load_base(base, quantization="none", dtype="float32"), EngineSettings(max_rank=8, kv_bytes=1 << 20))
    drive = Drive(engine)
    sampling = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True, num_logprobs=0)
    mixed = (_use(adapters[0], weight=0.5), _use(adapters[2], weight=0.25))
    drive.submit([Submit(id=RequestId("mixed"), prompt=PROMPTS[0], sampling=sampling, adapters=mixed)])
    drive.until_ended()
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for use in mixed:
        # Merged one after the other with B scaled by the weight: the dense weights of the sum.
        peft: Any = PeftModel.from_pretrained(model, str(use.folder))
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.data *= use.weight
        model = peft.merge_and_unload()
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([PROMPTS[0]])).logits[0, -1], dim=-1)
    (token,) = drive.outcomes[RequestId("mixed")].tokens
    assert token.token_id == int(expected.argmax())
    assert token.logprob == pytest.approx(float(expected.max()), abs=1e-4)
    engine.close()


@pytest.mark.slow
@pytest.mark.real_model
def test_engine_answers_alike_alone_and_mixed_when_the_base_is_int8(tmp_path: Path) -> None:
    folder = demo_base()
    adapters = [make_adapter(folder, tmp_path / f"a{seed}", seed=seed, std=0.02) for seed in range(2)]
    engine = Engine(load_base(folder, quantization="int8"), EngineSettings(num_slots=2, kv_bytes=1 << 28))
    prompt = tuple(engine.base.tokenizer.encode("The capital of France is"))
    greedy = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True, num_logprobs=0)
    drive = Drive(engine)
    uses: list[tuple[AdapterUse, ...]] = [(), *((_use(adapter),) for adapter in adapters)]
    drive.submit(
        Submit(id=RequestId(f"mixed{i}"), prompt=prompt, sampling=greedy, adapters=use) for i, use in enumerate(uses)
    )
    drive.until_ended()
    for i, use in enumerate(uses):
        drive.submit([Submit(id=RequestId(f"alone{i}"), prompt=prompt, sampling=greedy, adapters=use)])
        drive.until_ended()
        mixed, alone = drive.outcomes[RequestId(f"mixed{i}")], drive.outcomes[RequestId(f"alone{i}")]
        assert mixed.ids == alone.ids
    assert "Paris" in drive.outcomes[RequestId("mixed0")].text
    assert max(record.num_distinct_adapters for record in drive.records) == 2
    engine.close()
