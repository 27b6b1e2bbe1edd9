"""The plan says beforehand what the run then does: parameters, steps, tokens, and what autograd keeps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, LlamaConfig

from loractl.adapters.base_loading import load_base_model, quiet_libraries
from loractl.adapters.training import memory
from loractl.adapters.training.batches import collate_packs, pack
from loractl.adapters.training.events import Started
from loractl.adapters.training.frozen_int8 import FrozenInt8Linear
from loractl.adapters.training.loss import learned_positions
from loractl.adapters.training.memory import Ledger, Pass, empty_model, run_micro_batches
from loractl.adapters.training.planning import make_plan
from loractl.adapters.training.recipe import Recipe, resolve_recipe
from loractl.adapters.training.run import prepare, run
from loractl.adapters.training.trunk import Trunk
from loractl.cli.main import run as run_command
from tiny_models import make_adapter, make_tiny_base

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-base")


def _recipe(folder: Path, base: Path, **settings: Any) -> Recipe:
    rows = [{"text": "a quick film " * (1 + number % 3), "label": "positive"} for number in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"base": str(base), "out": str(folder / "out"), "quantize": "none", "dtype": "float32"}
    return resolve_recipe(
        preset="quick", file=None, settings=given | {"data.files": [str(folder / "rows.jsonl")]} | settings
    )


def test_plan_counts_what_the_run_reports(tmp_path: Path, base: Path) -> None:
    recipe = _recipe(tmp_path, base)
    plan = make_plan(recipe)
    events: list[Any] = []
    run(recipe, listener=events.append)
    started = next(event for event in events if isinstance(event, Started))
    assert (plan.num_parameters, plan.num_steps, plan.data) == (
        started.num_parameters,
        started.num_steps,
        started.data,
    )
    assert plan.memory.adapter == 16 * plan.num_parameters
    assert plan.fits


def test_run_that_goes_on_is_planned_with_the_rank_and_targets_of_its_beginning(tmp_path: Path, base: Path) -> None:
    begin = make_adapter(base, tmp_path / "begin", r=4, target_modules=["down_proj"])
    recipe = _recipe(tmp_path, base, **{"adapter.start_from": str(begin), "adapter.targets": ["W_pack"]})
    plan = make_plan(recipe)
    assert (plan.rank, plan.targets, plan.num_modules) == (4, ("down_proj",), 2)
    assert plan.num_parameters == 2 * 4 * (64 + 32)


def test_activations_are_computed_again_only_where_the_run_would_not_fit_otherwise(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(tmp_path, base)
    kept = make_plan(recipe)
    again = make_plan(_recipe(tmp_path, base, **{"train.checkpoint_activations": True}))
    assert not kept.checkpoint_activations
    assert again.memory.activations < kept.memory.activations
    monkeypatch.setattr(memory, "runtime_bytes", lambda _: kept.memory.runtime)
    monkeypatch.setattr(memory, "available_bytes", lambda _: kept.memory.total - 1)
    tight = make_plan(recipe)
    assert tight.checkpoint_activations
    assert tight.memory.activations == again.memory.activations
    assert not make_plan(_recipe(tmp_path, base, **{"train.checkpoint_activations": False})).fits
    outcome = run(recipe, listener=lambda _: None)
    assert outcome.manifest.recipe["train"]["checkpoint_activations"] is True


def test_activations_on_shapes_alone_equal_those_of_the_real_model(tmp_path: Path, base: Path) -> None:
    recipe = _recipe(tmp_path, base, **{"train.batch_size": 4})
    plan = make_plan(recipe)
    trunk = Trunk(load_base_model(base, quantization="none", dtype="float32", device="cpu"))
    trunk.attach("default", recipe, revision=None, examples=prepare(recipe).train, fresh=True)
    trunk.ready(quantize="none", expand_int8=False)
    trunk.activate("default")
    weights = {parameter.untyped_storage().data_ptr() for parameter in trunk.model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    # All rows of a step go through this tiny base one behind the other.
    steps = [collate_packs(pack(rows), trunk.device) for rows in run_micro_batches(prepare(recipe).train, recipe)]
    longest = max(steps, key=lambda tensors: tensors.ids.shape[1])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        learned_positions(trunk.model, longest)
    sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
    assert plan.memory.activations == pytest.approx(sum(sizes) + 2 * max(sizes), rel=0.05)


def test_card_keeps_eight_bit_moments_and_widens_one_weight_at_a_time(tmp_path: Path, base: Path) -> None:
    quiet_libraries()
    from bitsandbytes.nn import Linear8bitLt
    from bitsandbytes.optim import AdamW8bit

    recipe = _recipe(tmp_path, base, quantize="int8", **{"train.optimizer": "auto"})
    model, _ = empty_model(AutoConfig.from_pretrained(base), recipe, dtype=torch.bfloat16, device="cuda")
    largest = Pass(num_rows=1, num_tokens=8, num_learned=8)
    card, host = (Ledger(model, recipe, largest, device=device, runtime=0) for device in ("cuda", "cpu"))
    planned = [ledger.adapter(recompute=False) for ledger in (card, host)]

    parameter = torch.nn.Parameter(torch.randn(16, 4096))
    parameter.grad = torch.randn_like(parameter)
    optimizer: Any = AdamW8bit([parameter])
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
    moments = [value.nbytes for name, value in optimizer.state[parameter].items() if name[:-1] in {"state", "absmax"}]
    each = (parameter.nbytes + parameter.grad.nbytes + sum(moments)) / parameter.numel()
    assert planned[0].adapter == pytest.approx(each * card.num_parameters)

    config = model.config
    layer: Any = Linear8bitLt(config.hidden_size, config.intermediate_size, bias=False, has_fp16_weights=False)
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            sizes.extend([made.nbytes] if isinstance(made, torch.Tensor) else [])
            return made

    x = torch.randn(1, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    out = FrozenInt8Linear(layer.to("cpu").eval())(x)
    with Sizes():  # type: ignore[no-untyped-call]
        out.sum().backward()
    assert planned[0].activations - planned[1].activations == max(sizes)


def test_quantized_base_and_recomputed_activations_take_less(tmp_path: Path, base: Path) -> None:
    plain = make_plan(_recipe(tmp_path, base))
    small = make_plan(
        _recipe(tmp_path, base, quantize="nf4", **{"train.expand_int8": False, "train.checkpoint_activations": True})
    )
    assert small.memory.base < plain.memory.base
    assert small.memory.activations < plain.memory.activations
    assert plain.memory.total - plain.memory.runtime < plain.full_fine_tuning.total - plain.full_fine_tuning.runtime


def test_command_prints_the_ledger(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _recipe(tmp_path, base)
    words = ["plan", "--base", str(base), "--data", str(tmp_path / "rows.jsonl")]
    assert run_command([*words, "--probe"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if line[0] != " "] == [
        "Base",
        "Data",
        "Adapter",
        "Memory",
        "Steps",
    ]
    assert "full fine-tuning:" in said
    assert run_command([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["total"] > 0


def test_page_of_costs_says_what_the_ledger_counts() -> None:
    page = (Path(memory.__file__).parent / "COSTS.md").read_text()
    shape: Any = {"vocab_size": 64_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32}
    config = LlamaConfig(**shape, num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False)
    recipes = {
        held: resolve_recipe(preset="article", file=None, settings={"quantize": held})
        for held in ("int8", "nf4", "none")
    }
    model, _ = empty_model(config, recipes["int8"], dtype=torch.bfloat16, device="cuda")
    largest = Pass(num_rows=2, num_tokens=512, num_learned=6)
    ledgers = {held: Ledger(model, one, largest, device="cuda", runtime=600 << 20) for held, one in recipes.items()}
    ours, full = ledgers["int8"].adapter(recompute=True), ledgers["int8"].full(recompute=True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    said = {row[0]: [float(cell) if cell else 0.0 for cell in row[2:]] for row in rows[1:]}
    counted = {
        "base": (ours.base, full.base),
        "trained weights, gradients, optimizer": (ours.adapter, full.adapter),
        "activations": (ours.activations, full.activations),
        "loss": (ours.loss, full.loss),
        "runtime": (ours.runtime, full.runtime),
        "all": (ours.total, full.total),
    }
    assert said == {part: [round(each / 2**30, 2) for each in both] for part, both in counted.items()}
    kept = ledgers["int8"].adapter(recompute=False)
    for figure in (
        f"**{full.total / ours.total:.1f} times**",
        f"{ledgers['int8'].num_parameters:,} weights",
        f"activations are {kept.activations / 2**30:.2f} GiB",
        f"all is {kept.total / 2**30:.2f}",
        f"all is {ledgers['nf4'].adapter(recompute=True).total / 2**30:.2f}",
        f"bfloat16, {ledgers['none'].adapter(recompute=True).total / 2**30:.2f}",
    ):
        assert figure in page
