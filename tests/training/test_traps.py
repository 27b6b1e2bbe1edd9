"""What users of other trainers trip over, one test a trap, named after it.

More traps stand where their subject is tested: `test_trap_` in the other files of this folder, rows without a place,
templates that rewrite history and rows that are too long in `test_data.py`, resuming in `test_resume.py`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from loractl.adapters.base_loading import load_base_model
from loractl.adapters.errors import TargetsMissing
from loractl.adapters.training.batches import collate
from loractl.adapters.training.evaluation import evaluate
from loractl.adapters.training.examples import make_example
from loractl.adapters.training.loss import summed_loss
from loractl.adapters.training.recipe import DataPart, Recipe
from loractl.adapters.training.rows import read_rows
from loractl.adapters.training.run import Outcome, run
from loractl.adapters.training.targets import resolve_targets
from loractl.adapters.training.trunk import Trunk
from loractl.adapters.validation import FolderTree, Policy, validate_tree
from tiny_models import make_adapter, make_tiny_base
from tiny_runs import tiny_recipe

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def _recipe(folder: Path, base: Path, **settings: Any) -> Recipe:
    return tiny_recipe(folder, base, repeat=2, **({"train.epochs": 1.0} | settings))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-base")


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(_recipe(tmp_path_factory.mktemp("run"), base), listener=lambda event: None)


@pytest.fixture
def tokenizer(base: Path) -> Any:
    return AutoTokenizer.from_pretrained(base)


def test_trap_target_modules_absent_names_the_fused_layer_that_is_there() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32))
    with pytest.raises(TargetsMissing, match="no module named q_proj or v_proj") as caught:
        resolve_targets(model, ["q_proj", "v_proj"])
    assert "--targets c_attn" in (caught.value.hint or "")
    assert "c_attn x1" in (caught.value.hint or "")


def test_trap_stop_token_never_learned_where_padding_is_the_stop_token(tmp_path: Path, tokenizer: Any) -> None:
    """The usual cause is a collator that masks by the padding token's id."""
    tokenizer.pad_token = tokenizer.eos_token
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a quick fox", "completion": "over the dog"}\n')
    examples = [make_example(row, tokenizer, DataPart()) for row in read_rows(path)]
    tensors = collate(examples, torch.device("cpu"))
    for row, example in enumerate(examples):
        last = len(example.ids) - 1
        assert tensors.ids[row, last] == tokenizer.eos_token_id
        assert tensors.learned[row, last]
        assert not tensors.learned[row, last + 1 :].any()
    assert len(examples[0].ids) < len(examples[1].ids)


def test_trap_mask_of_all_or_nothing_is_impossible(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "the quick"}, {"role": "assistant", "content": "brown fox"}]
    path.write_text(json.dumps({"messages": messages}))
    (row,) = read_rows(path)
    example = make_example(row, tokenizer, DataPart())
    assert 0 < example.num_learned < len(example.ids)
    learned = [token for token, is_learned in zip(example.ids, example.learned, strict=True) if is_learned]
    assert tokenizer.decode(learned) == "brown fox<|im_end|>"


def test_trap_double_bos_where_the_template_brings_one(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    path = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path.write_text(json.dumps({"messages": messages}))
    (row,) = read_rows(path)
    assert make_example(row, tokenizer, DataPart()).ids.count(tokenizer.bos_token_id) == 1


def test_trap_accumulation_loss_is_over_the_tokens_of_the_whole_step(base: Path, tmp_path: Path) -> None:
    """One row eight times and eight rows once are the same step, however their lengths differ."""
    weights = []
    for number, (size, accumulation) in enumerate(((1, 6), (6, 1))):
        folder = tmp_path / str(number)
        folder.mkdir()
        sizes = {"train.batch_size": size, "train.accumulation": accumulation, "adapter.dropout": 0.0}
        outcome = run(_recipe(folder, base, **sizes), listener=lambda event: None)
        weights.append(load_file(outcome.folder / "adapter_model.safetensors"))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-6, rtol=1e-5)


def test_trap_adapter_refused_by_servers_for_whole_modules_or_biases(trained: Outcome) -> None:
    config = json.loads((trained.folder / "adapter_config.json").read_text())
    assert not config["modules_to_save"]
    assert config["bias"] == "none"
    assert not config["use_dora"]
    assert "lm_head" not in config["target_modules"]


def test_trap_embeddings_saved_along_and_vocabulary_grown(trained: Outcome) -> None:
    names = load_file(trained.folder / "adapter_model.safetensors").keys()
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)


def test_trap_lora_that_does_nothing_is_told_at_push(base: Path, tmp_path: Path, trained: Outcome) -> None:
    """An untrained adapter warns; a trained one has probes that differ from the base's."""
    idle = make_adapter(base, tmp_path / "idle", std=0.0)
    assert "W_ZERO_B" in {finding.code for finding in validate_tree(FolderTree(idle), policy=Policy()).findings}
    assert any(probe.adapter_logprobs != probe.base_logprobs for probe in trained.manifest.probes)


def test_trap_base_named_by_a_path_of_this_machine(trained: Outcome, base: Path) -> None:
    config = json.loads((trained.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.name
    for path in trained.folder.iterdir():
        if path.name not in {"recipe.lock.yaml", "adapter_model.safetensors"}:
            assert str(base.parent) not in path.read_text()
    assert trained.manifest.base is not None
    assert trained.manifest.base.fingerprint.startswith("sha256:")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_trap_unscaling_half_gradients_where_masters_are_float32(base: Path, tmp_path: Path, dtype: str) -> None:
    recipe = _recipe(tmp_path, base, dtype=dtype)
    trunk = Trunk(load_base_model(base, quantization="none", dtype=dtype))  # type: ignore[arg-type]
    trunk.attach("default", recipe, revision=None, examples=[], fresh=True)
    trunk.ready(quantize="none", expand_int8=False)
    trunk.activate("default")
    assert {parameter.dtype for _, parameter in trunk.parameters("default")} == {torch.float32}


def test_trap_eight_bit_evaluation_is_the_arithmetic_that_serves(base: Path, tmp_path: Path, tokenizer: Any) -> None:
    """In training mode the CPU multiplies expanded weights; evaluation must not."""
    recipe = _recipe(tmp_path, base, quantize="int8")
    trunk = Trunk(load_base_model(base, quantization="int8", dtype="float32"))
    trunk.attach("default", recipe, revision=None, examples=[], fresh=True)
    trunk.ready(quantize="int8", expand_int8=True)
    rows = read_rows(Path(recipe.data.files[0]))
    examples = [make_example(row, tokenizer, DataPart(template=recipe.data.template)) for row in rows]
    with trunk.as_served("default"):
        served = evaluate(trunk.model, examples)
    untouched = load_base_model(base, quantization="int8", dtype="float32")
    assert served == pytest.approx(evaluate(untouched, examples), abs=1e-6)
    trunk.activate("default")
    num_learned = sum(sum(example.learned[1:]) for example in examples)
    with torch.no_grad():
        trained = summed_loss(trunk.model.eval(), examples).item() / num_learned
    assert trained != pytest.approx(served, abs=1e-6)


def test_trap_local_data_needs_no_registry(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "some file.csv"
    path.write_text("text,label\nfine,positive\n")
    (row,) = read_rows(path)
    assert (row.fields["text"], row.fields["label"]) == ("fine", "positive")


def test_trap_tool_arguments_polluted_with_nulls(tmp_path: Path, tokenizer: Any) -> None:
    def call(arguments: dict[str, Any]) -> dict[str, Any]:
        function = {"name": "look", "arguments": arguments}
        return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}

    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments | tojson }}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    )
    user = {"role": "user", "content": "go"}
    path = tmp_path / "rows.jsonl"
    lines = [[user, call({"city": "Oslo", "a": None, "b": None})], [user, call({"x": 1})]]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in lines))
    texts = [tokenizer.decode(make_example(row, tokenizer, DataPart()).ids) for row in read_rows(path)]
    assert texts == ['go<|im_end|>{"city": "Oslo"}<|im_end|>', 'go<|im_end|>{"x": 1}<|im_end|>']
