"""Every kind of LoRA that PEFT writes and this engine serves answers as PEFT; every other is refused by its name."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine_drive import Drive, adapter_use
from loractl.adapters.errors import Incompatible, LoractlError
from loractl.server.engine.base_model import load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.messages import AdapterUse, RequestId, Sampling, Submit
from loractl.server.engine.settings import EngineSettings
from peft_oracle import alone
from tiny_families import make_family_base
from tiny_models import make_adapter, make_tiny_base

SETTINGS = EngineSettings(num_slots=4, max_rank=8, max_batch_tokens=24, max_running=16, block_size=4, kv_bytes=1 << 20)
PROMPTS = ((5, 9, 40, 41, 200), tuple(range(60, 82)))
NUM_OUTPUT_TOKENS = 8
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True, "target_modules": "all-linear", "std": 0.1},
    "dora-rslora-pattern": {
        "use_dora": True,
        "use_rslora": True,
        "r": 6,
        "rank_pattern": {"o_proj": 3},
        "target_modules": ATTENTION,
    },
    "patterns": {
        "r": 4,
        "rank_pattern": {"layers.1.self_attn.v_proj": 2, "up_proj": 7},
        "alpha_pattern": {"q_proj": 3, "layers.0.mlp.up_proj": 20},
        "target_modules": [*ATTENTION, "up_proj"],
    },
    "one-layer": {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
    "expression": {"target_modules": r".*layers\.0\..*(gate|up)_proj"},
}
TABLES: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head", "v_proj"], "r": 3},
    "both": {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "use_rslora": True},
    "dora-head": {"target_modules": ["lm_head"], "use_dora": True},
}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "untied", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "tied")


@pytest.fixture
def drive(untied: Path) -> Iterator[Drive]:
    drive = _drive(untied)
    yield drive
    drive.engine.close()


def _drive(base: Path, settings: EngineSettings = SETTINGS) -> Drive:
    return Drive(Engine(load_base(base, quantization="none", dtype="float32"), settings))


def _use(folder: Path, weight: float = 1.0) -> AdapterUse:
    return adapter_use(folder, weight=weight)


def _submit(name: str, prompt: tuple[int, ...], *uses: AdapterUse) -> Submit:
    sampling = Sampling(max_tokens=NUM_OUTPUT_TOKENS, temperature=0.0, ignore_eos=True, num_logprobs=0)
    return Submit(id=RequestId(name), prompt=prompt, adapters=uses, sampling=sampling)


def _check_as_alone(drive: Drive, base: Path, folders: dict[str, Path], prompts: Any = PROMPTS) -> None:
    """Run every adapter and the base on every prompt in one batch."""
    cases = [(name, i) for name in ("base", *folders) for i in range(len(prompts))]
    drive.submit(
        _submit(f"{name}-{i}", prompts[i], *([_use(folders[name])] if name in folders else [])) for name, i in cases
    )
    drive.until_ended()
    for name, i in cases:
        outcome = drive.outcomes[RequestId(f"{name}-{i}")]
        ids, logprobs, _ = alone(base, folders.get(name), prompts[i], NUM_OUTPUT_TOKENS)
        assert outcome.ids == ids, name
        assert [token.logprob for token in outcome.tokens] == pytest.approx(logprobs, abs=1e-4), name


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT names what it finds unusual in these adapters
@pytest.mark.parametrize("kinds", [KINDS, TABLES], ids=["linear", "tables"])
def test_every_kind_answers_as_peft_when_all_run_in_one_batch(
    drive: Drive, untied: Path, tmp_path: Path, kinds: dict[str, dict[str, Any]]
) -> None:
    folders = {
        name: make_adapter(untied, tmp_path / name, seed=seed, **settings)
        for seed, (name, settings) in enumerate(kinds.items())
    }
    _check_as_alone(drive, untied, folders)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True},
    ],
    ids=["embedding", "head", "tied"],
)
def test_tables_of_a_tied_base_answer_as_peft(tied: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = make_adapter(tied, tmp_path / "adapter", **settings)
    drive = _drive(tied)
    _check_as_alone(drive, tied, {"adapter": folder})
    drive.engine.close()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "gpt_neox"])
def test_tables_and_dora_answer_as_peft_in_other_families(tmp_path: Path, family: str) -> None:
    base = make_family_base(tmp_path / family, family, tie_word_embeddings=False)
    extra: dict[str, Any] = {"fan_in_fan_out": True} if family == "gpt2" else {}
    tables = {"gpt2": ["wte"], "gemma3": ["embed_tokens", "lm_head"], "gpt_neox": ["embed_in", "embed_out"]}[family]
    folders = {
        "tables": make_adapter(base, tmp_path / "tables", target_modules=tables, **extra),
        "dora": make_adapter(base, tmp_path / "dora", target_modules="all-linear", use_dora=True, std=0.1, **extra),
    }
    drive = _drive(base)
    _check_as_alone(drive, base, folders)
    drive.engine.close()


def test_w_pack_and_its_parts_both_answer_as_on_the_fused_layer(tmp_path: Path) -> None:
    """PEFT knows the base only split, so the oracle is the three layers with the same A and their rows of B."""
    base = make_family_base(tmp_path / "baichuan", "baichuan")
    parts = make_adapter(base, tmp_path / "parts", target_modules=["q_proj", "k_proj", "v_proj"], r=4)
    weights = load_file(parts / "adapter_model.safetensors")
    fused = {}
    for name in list(weights):
        if "q_proj.lora_A" in name:
            for other in ("k_proj", "v_proj"):
                weights[name.replace("q_proj", other)] = weights[name].clone()
            fused[name.replace("q_proj", "W_pack")] = weights[name]
        elif "q_proj.lora_B" in name:
            rows = [weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            fused[name.replace("q_proj", "W_pack")] = torch.cat(rows)
    save_file(weights, parts / "adapter_model.safetensors")
    packed = tmp_path / "packed"
    packed.mkdir()
    save_file(fused, packed / "adapter_model.safetensors")
    config = (parts / "adapter_config.json").read_text()
    for name in ("k_proj", "v_proj"):
        config = config.replace(f'"{name}",', "")
    for name in ("q_proj", "k_proj", "v_proj"):
        config = config.replace(f'"{name}"', '"W_pack"')
    (packed / "adapter_config.json").write_text(config)
    drive = _drive(base)
    _check_as_alone(drive, base, {"parts": parts})
    drive.submit([_submit("packed", PROMPTS[1], _use(packed))])
    drive.until_ended()
    assert drive.outcomes[RequestId("packed")].ids == alone(base, parts, PROMPTS[1], NUM_OUTPUT_TOKENS)[0]
    assert drive.outcomes[RequestId("packed")].ids != alone(base, None, PROMPTS[1], NUM_OUTPUT_TOKENS)[0]
    drive.engine.close()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weighted_adapters_are_summed_when_their_kinds_and_targets_differ(
    drive: Drive, untied: Path, tmp_path: Path
) -> None:
    first = make_adapter(untied, tmp_path / "first", target_modules=["q_proj", "embed_tokens"], seed=1)
    second = make_adapter(untied, tmp_path / "second", target_modules=["q_proj", "lm_head"], r=2, seed=2)
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32), str(first), adapter_name="first"
    )
    model.load_adapter(str(second), adapter_name="second")
    model.base_model.set_adapter(["first", "second"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.mul_(0.7 if "first" in name else -0.4)
        scores = torch.log_softmax(model.eval()(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1], -1)
    drive.submit([_submit("sum", PROMPTS[0], _use(first, 0.7), _use(second, -0.4))])
    drive.until_ended()
    token = drive.outcomes[RequestId("sum")].tokens[0]
    assert token.token_id == int(scores.argmax())
    assert token.logprob == pytest.approx(float(scores.max()), abs=1e-4)


def test_weighted_adapters_answer_as_pefts_own_combination_of_them(drive: Drive, untied: Path, tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{"r": 3, "lora_alpha": 9}, {"r": 5, "use_rslora": True}, {"r": 8, "std": 0.1}]
    weights = (0.7, 0.5, 1.2)
    folders = [
        make_adapter(untied, tmp_path / f"{n}", seed=n, target_modules="all-linear", **each)
        for n, each in enumerate(settings)
    ]
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32), str(folders[0]), adapter_name="0"
    )
    for n in (1, 2):
        model.load_adapter(str(folders[n]), adapter_name=str(n))
    model.add_weighted_adapter(["0", "1", "2"], list(weights), "sum", combination_type="cat")
    model.set_adapter("sum")
    ids, expected = list(PROMPTS[0]), []
    for _ in range(NUM_OUTPUT_TOKENS):
        with torch.inference_mode():
            scores = torch.log_softmax(model.eval()(input_ids=torch.tensor([ids])).logits[0, -1], -1)
        ids.append(int(scores.argmax()))
        expected.append(float(scores.max()))
    uses = [_use(folder, weight) for folder, weight in zip(folders, weights, strict=True)]
    drive.submit([_submit("alone", PROMPTS[0], uses[0]), _submit("sum", PROMPTS[0], *uses), _submit("b", PROMPTS[0])])
    drive.until_ended()
    outcome = drive.outcomes[RequestId("sum")]
    assert outcome.ids == ids[len(PROMPTS[0]) :]
    assert [token.logprob for token in outcome.tokens] == pytest.approx(expected, abs=1e-4)


def test_rank_above_the_slots_is_cut_with_its_energy_told_when_allowed(
    untied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_adapter(untied, tmp_path / "wide", r=16, target_modules=["q_proj"])
    weights = load_file(folder / "adapter_model.safetensors")
    for name in weights:
        if "lora_B" in name:
            weights[name][:, 5:] *= 1e-3  # eleven of sixteen directions are almost nothing
    save_file(weights, folder / "adapter_model.safetensors")
    drive = _drive(untied, EngineSettings(num_slots=2, max_rank=8, max_running=8, kv_bytes=1 << 20, truncate_rank=True))
    drive.engine.resolve_adapter(folder)
    with caplog.at_level(logging.WARNING):
        drive.submit([_submit("cut", PROMPTS[0], _use(folder))])
        drive.until_ended()
    (slot,) = drive.engine.stats().slots
    assert slot.rank == 8
    assert 0.99999 < slot.energy_kept < 1.0
    assert "rank 16 is served at rank 8" in caplog.text
    assert drive.outcomes[RequestId("cut")].ids == alone(untied, folder, PROMPTS[0], NUM_OUTPUT_TOKENS)[0]
    drive.engine.close()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"r": 16}, "rank 16"),
        ({"bias": "lora_only"}, "bias=lora_only"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [(0, 2), (0, 2)]}, "layer_replication"),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, "DoRA on model.embed_tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_served_is_refused_by_name(
    drive: Drive, untied: Path, tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    folder = make_adapter(untied, tmp_path / "odd", **settings)
    with pytest.raises(Incompatible, match=named):
        drive.engine.resolve_adapter(folder)
    drive.submit([_submit("odd", PROMPTS[0], _use(folder)), _submit("base", PROMPTS[0])])
    drive.until_ended()
    assert isinstance(drive.outcomes[RequestId("odd")].failed.error, Incompatible)
    assert drive.outcomes[RequestId("base")].finished.reason == "length"


def test_other_peft_types_are_refused_by_name(drive: Drive, untied: Path, tmp_path: Path) -> None:
    folder = make_adapter(untied, tmp_path / "ia3")
    config = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(config.replace('"LORA"', '"IA3"'))
    with pytest.raises(LoractlError, match="IA3"):
        drive.engine.resolve_adapter(folder)
