"""Rank by target by popularity by phase: every row of every mixed batch is what PEFT computes for it alone.

The whole vocabulary of every position is compared, not only what was chosen.
"""

import dataclasses
import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from engine_drive import Drive, adapter_use
from loractl.server.engine.base_model import load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.messages import AdapterUse, RequestId, Sampling, Submit
from loractl.server.engine.settings import EngineSettings
from tiny_models import make_adapter, make_tiny_base

pytestmark = [
    pytest.mark.slow,
    pytest.mark.drill,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT names what it finds unusual in these adapters
]

Phase = Literal["prefill", "decode", "mixed"]

LONG = os.environ.get("LORACTL_DRILLS") == "long"
RANKS = (1, 5, 8, 64)
TARGETS: dict[str, dict[str, Any]] = {
    "attention": {},
    "linear": {"target_modules": "all-linear", "std": 0.1},
    "tables": {"target_modules": ["q_proj", "v_proj", "embed_tokens", "lm_head"], "std": 0.1},
    "dora": {"target_modules": "all-linear", "use_dora": True, "std": 0.1},
    "rslora": {"target_modules": ["o_proj", "down_proj"], "use_rslora": True, "std": 0.1},
    "pattern": {"rank_pattern": {"layers.1.self_attn.v_proj": 3}, "alpha_pattern": {"q_proj": 5}},
}
POPULARITIES = ("identical", "distinct", "uniform", "zipf", "skewed")
VOCABULARY = 96
NUM_ROWS = 72 if LONG else 16
PROMPTS = ((7,), (5, 9, 40, 41), tuple(range(50, 73)))
NUM_OUTPUTS: dict[Phase, int] = {"prefill": 1, "decode": 6, "mixed": 4}
SETTINGS = EngineSettings(
    num_slots=24, max_rank=64, max_running=16, max_batch_tokens=24, block_size=4, kv_bytes=1 << 21, prefix_cache=False
)


class Oracle:
    """PEFT's greedy tokens and log probabilities [tokens, vocabulary] for each adapter and prompt, computed once."""

    def __init__(self, base: Path, folders: list[Path | None]) -> None:
        self.answers = [[self._greedy(model, prompt) for prompt in PROMPTS] for model in self._models(base, folders)]

    @staticmethod
    def _models(base: Path, folders: list[Path | None]) -> Iterator[Any]:
        for folder in folders:
            model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            yield (model if folder is None else PeftModel.from_pretrained(model, str(folder))).eval()

    @staticmethod
    @torch.inference_mode()
    def _greedy(model: Any, prompt: tuple[int, ...]) -> tuple[list[int], torch.Tensor]:
        ids, rows = list(prompt), []
        for _ in range(max(NUM_OUTPUTS.values())):
            rows.append(torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1], -1))
            ids.append(int(rows[-1].argmax()))
        return ids[len(prompt) :], torch.stack(rows)


@dataclasses.dataclass(frozen=True)
class Bench:
    """One engine for all cases, its adapters (the bare base first) and what PEFT says of them."""

    drive: Drive
    uses: list[tuple[AdapterUse, ...]]
    oracle: Oracle


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("matrix")
    base = make_tiny_base(root / "base", vocab_size=VOCABULARY, tie_word_embeddings=False)
    every = [(rank, name) for rank in RANKS for name in TARGETS]
    # In short, every rank and every kind of targets once or twice; the whole product in the long form.
    kinds = every if LONG else [*zip(itertools.cycle(RANKS), TARGETS, strict=False), (64, "linear"), (8, "attention")]
    folders = [
        make_adapter(base, root / f"{name}{rank}", seed=seed, **{"r": rank, "lora_alpha": 2 * rank, **TARGETS[name]})
        for seed, (rank, name) in enumerate(kinds)
    ]
    uses: list[tuple[AdapterUse, ...]] = [(), *((adapter_use(f),) for f in folders)]
    oracle = Oracle(base, [None, *folders])
    answers = {tuple(answer[0][0]) for answer in oracle.answers}
    assert len(answers) > len(folders) // 2  # the adapters say different things
    drive = Drive(Engine(load_base(base, quantization="none", dtype="float32"), SETTINGS))
    for number, use in enumerate(uses):  # all resident, so that they do meet in a step
        sampling = Sampling(max_tokens=1, temperature=0.0)
        drive.submit([Submit(id=RequestId(f"warm{number}"), prompt=PROMPTS[0], adapters=use, sampling=sampling)])
    drive.until_ended()
    yield Bench(drive, uses, oracle)
    drive.engine.close()


def _drawn(popularity: str, num_adapters: int) -> list[list[int]]:
    """Batches of adapter numbers, 0 the bare base, so that in the end every adapter was in one."""
    chance = random.Random(popularity)
    everyone = list(range(num_adapters))
    if popularity == "identical":
        return [[number] * (NUM_ROWS // 4) for number in everyone]
    if popularity == "distinct":
        return [chance.sample(everyone, num_adapters) for _ in range(3 if LONG else 1)]
    weights = {
        "uniform": [1.0] * num_adapters,
        "zipf": [1 / (rank + 1) for rank in everyone],
        "skewed": [20.0] + [0.5] * (num_adapters - 1),
    }[popularity]
    batches = []
    for _ in range(4 if LONG else 1):
        chance.shuffle(everyone)  # another adapter is the popular one
        batches.append(chance.choices(everyone, weights, k=NUM_ROWS))
    return batches


def _prompt_of(phase: Phase, row: int) -> int:
    return {"prefill": 2, "decode": row % 2, "mixed": row % 3}[phase]


@pytest.mark.parametrize("phase", NUM_OUTPUTS)
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_every_row_is_what_peft_computes_alone(bench: Bench, popularity: str, phase: Phase) -> None:
    sampling = Sampling(max_tokens=NUM_OUTPUTS[phase], temperature=0.0, ignore_eos=True, num_logprobs=VOCABULARY)
    drive, largest, num_rows = bench.drive, 0.0, 0
    drive.records.clear()
    for adapters in _drawn(popularity, len(bench.uses)):
        drive.outcomes.clear()
        for row, number in enumerate(adapters):
            prompt = PROMPTS[_prompt_of(phase, row)]
            drive.submit(
                [Submit(id=RequestId(f"{row}"), prompt=prompt, adapters=bench.uses[number], sampling=sampling)]
            )
            if phase == "mixed" and row % 3 == 0:
                drive.once()  # later prompts come in beside rows that decode
        drive.until_ended()
        for row, number in enumerate(adapters):
            outcome = drive.outcomes[RequestId(f"{row}")]
            ids, expected = bench.oracle.answers[number][_prompt_of(phase, row)]
            assert outcome.ids == ids[: NUM_OUTPUTS[phase]], (row, bench.uses[number])
            for token, wanted in zip(outcome.tokens, expected, strict=False):
                found = torch.empty(VOCABULARY)
                found[[each.token_id for each in token.top]] = torch.tensor([each.logprob for each in token.top])
                largest = max(largest, float((found - wanted).abs().max()))
            num_rows += 1
    most = max(record.num_distinct_adapters for record in drive.records)
    print(f"\nmatrix {popularity} {phase} rows={num_rows} most_in_one_step={most} largest_difference={largest:.1e}")
    assert largest <= 1e-4
    if popularity == "distinct" and phase == "decode":
        assert most >= min(len(bench.uses) - 1, SETTINGS.max_running - 1)
