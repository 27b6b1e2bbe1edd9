"""What a run would take: rows, tokens, steps, and bytes by part beside full fine-tuning. Loads no weights.

Activations are counted, not guessed: the model runs on torch's meta device, where tensors have shapes and no memory,
and what autograd would keep for the backward pass is summed.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loractl.adapters.base_loading import pick_dtype, quiet_libraries, teach_layout
from loractl.adapters.training.batches import MICRO_BATCH_TOKENS, micro_batches, num_steps, padded_tokens, step_rows
from loractl.adapters.training.data_summary import DataSummary
from loractl.adapters.training.examples import Example
from loractl.adapters.training.loss import CHUNK_POSITIONS
from loractl.adapters.training.recipe import Recipe
from loractl.adapters.training.rows import rows_digest
from loractl.adapters.training.run import Inputs, prepare, resolve_numbers

_ADAM_BYTES = 16  # float32 weight, gradient and two moments
_QUANTIZED_BYTES = {"int8": 1.0, "nf4": 0.5 + 0.127 / 8}
# Logits of a chunk: in the model's type, in float32, and the gradients of both.
_LOGIT_BYTES = 12
# What the process holds beyond tensors once a step has run: compiled products, threads' stacks, the allocator's slack.
_RUNTIME_EXTRA_BYTES = 160 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes at the peak of a run, by what they are for."""

    base: int
    adapter: int
    """Adapter, its gradients and optimizer state; all weights for full fine-tuning."""
    activations: int
    loss: int
    runtime: int

    @property
    def total(self) -> int:
        return self.base + self.adapter + self.activations + self.loss + self.runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that is known of a run before it."""

    base_id: str
    base_fingerprint: str
    base_chat_template_sha256: str | None
    quantize: str
    dtype: str
    """What is computed in."""
    data: DataSummary
    data_digest: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    num_modules: int
    num_parameters: int
    learning_rate: float
    epochs: float
    num_steps: int
    rows_per_step: int
    num_padded_tokens: int
    """Tokens that go through the model in the whole run, padding included."""
    checkpoint_activations: bool
    """Whether activations are computed again: as the recipe says, else where the run would not fit otherwise."""
    memory: Memory
    full_fine_tuning: Memory
    available_bytes: int | None
    device: str
    seconds: float | None = None
    """Length of the run by a probe, where one was made."""

    @property
    def fits(self) -> bool:
        """Whether the peak is below what the device has free."""
        return self.available_bytes is None or self.memory.total <= self.available_bytes


def make_plan(recipe: Recipe, inputs: Inputs | None = None) -> Plan:
    """Plan a run, reading its data where `inputs` are not given; raises what `train` would before its first step."""
    import torch

    quiet_libraries()
    recipe = resolve_numbers(recipe)
    inputs = inputs or prepare(recipe)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = pick_dtype(recipe.dtype, device=device)
    model, targets = _empty_model(inputs.folder, recipe, dtype=dtype, device=device)
    width = dtype.itemsize
    linear, other, num_adapter, num_modules = _count(model)
    micros = _micro_batches(inputs.train, recipe)
    largest = max(micros, key=lambda micro: padded_tokens(micro) * micro[-1].longest ** 0.2)
    num_rows, num_tokens = sum(len(row.sequences) for row in largest), largest[-1].longest
    num_learned = max(sum(example.num_learned for example in micro) for micro in micros)
    loss = min(num_learned, CHUNK_POSITIONS) * int(model.config.vocab_size) * _LOGIT_BYTES
    base = round(linear * _QUANTIZED_BYTES.get(recipe.quantize, width)) + other * width
    if recipe.quantize == "int8" and device == "cpu" and recipe.train.expand_int8 is not False:
        base += linear * width
    runtime, available = _runtime_bytes(device), _available_bytes(device)

    def memory(*, recompute: bool) -> Memory:
        activations = _activation_bytes(model, num_rows=num_rows, num_tokens=num_tokens, recompute=recompute)
        return Memory(base=base, adapter=num_adapter * _ADAM_BYTES, activations=activations, loss=loss, runtime=runtime)

    recompute = bool(recipe.train.checkpoint_activations)
    needed = memory(recompute=recompute)
    if recipe.train.checkpoint_activations is None and available is not None and needed.total > available:
        recompute, needed = True, memory(recompute=True)
    with model.disable_adapter():
        model.get_base_model().requires_grad_(True)
        of_all = _activation_bytes(model, num_rows=num_rows, num_tokens=num_tokens, recompute=recompute)
    full = Memory(base=0, adapter=(linear + other) * _ADAM_BYTES, activations=of_all, loss=loss, runtime=runtime)
    return Plan(
        base_id=inputs.identity.id,
        base_fingerprint=inputs.identity.fingerprint,
        base_chat_template_sha256=inputs.identity.chat_template_sha256,
        quantize=recipe.quantize,
        dtype=str(dtype).removeprefix("torch."),
        data=inputs.summary,
        data_digest=rows_digest(inputs.rows),
        rank=recipe.adapter.rank,
        alpha=recipe.adapter.alpha,
        targets=tuple(targets),
        num_modules=num_modules,
        num_parameters=num_adapter,
        learning_rate=float(recipe.train.learning_rate),
        epochs=recipe.train.epochs,
        num_steps=num_steps(len(inputs.train), recipe.train),
        rows_per_step=recipe.train.batch_size * recipe.train.accumulation,
        num_padded_tokens=sum(padded_tokens(micro) for micro in micros),
        checkpoint_activations=recompute,
        memory=needed,
        full_fine_tuning=full,
        available_bytes=available,
        device=device,
    )


def probe_seconds(recipe: Recipe, plan: Plan) -> float:
    """Load the base, run forward and backward on the two longest rows, and scale to the whole run."""
    import time

    from loractl.adapters.base_loading import load_base_model
    from loractl.adapters.training.loss import summed_loss
    from loractl.adapters.training.preference import Reference, pair_sums
    from loractl.adapters.training.trunk import Trunk

    recipe = resolve_numbers(recipe)
    inputs: Inputs = prepare(recipe)
    rows = sorted(inputs.train, key=lambda example: example.longest)[-2:]
    trunk = Trunk(load_base_model(inputs.folder, quantization=recipe.quantize, dtype=recipe.dtype))
    trunk.attach("default", recipe, revision=None, examples=inputs.train, fresh=True)
    trunk.ready(quantize=recipe.quantize, expand_int8=recipe.train.expand_int8 is not False)
    trunk.activate("default", recompute=plan.checkpoint_activations)
    reference = Reference(trunk, "default", [], is_adapter=False) if rows[0].rejected else None
    seconds = 0.0
    for _ in range(2):  # the first pass also compiles
        start = time.perf_counter()
        if reference is None:
            loss = summed_loss(trunk.model, rows)
        else:
            loss = pair_sums(trunk, rows, reference, recipe.preference).loss
        loss.backward()  # type: ignore[no-untyped-call]
        if trunk.device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds / padded_tokens(rows) * plan.num_padded_tokens


def _empty_model(folder: Path, recipe: Recipe, *, dtype: Any, device: str) -> tuple[Any, list[str]]:
    """The base with its adapter on the meta device, as it will compute."""
    from accelerate import init_empty_weights
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from loractl.adapters.training.targets import resolve_targets

    teach_layout(folder)
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    attention = "eager" if device == "cpu" else "sdpa"
    with init_empty_weights(include_buffers=True):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    base.requires_grad_(False)
    targets = resolve_targets(base, recipe.adapter.targets)
    part = recipe.adapter
    settings: Any = {"r": part.rank, "lora_alpha": part.alpha, "lora_dropout": part.dropout, "use_dora": part.dora}
    with warnings.catch_warnings():
        # PEFT asks a transformers model by a name that transformers has deprecated.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        model = get_peft_model(base, LoraConfig(target_modules=targets, **settings), low_cpu_mem_usage=True)
    return model.train(), targets


def _count(model: Any) -> tuple[int, int, int, int]:
    """Count the weights of linear layers, all other weights, the adapter's, and the layers that it reaches."""
    import torch

    from loractl.adapters.training.targets import linear_names

    base = model.get_base_model()
    names = linear_names(base)
    linear = sum(
        module.weight.numel()
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear)
        and ".lora_" not in name
        and name.removesuffix(".base_layer").rpartition(".")[2] in names
    )
    adapter = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    every = sum(parameter.numel() for parameter in model.parameters())
    num_modules = sum(hasattr(module, "lora_A") for module in base.modules())
    return linear, every - adapter - linear, adapter, num_modules


def _micro_batches(train: Sequence[Example], recipe: Recipe) -> list[list[Example]]:
    return [
        micro
        for rows in step_rows(len(train), recipe.train)
        for micro in micro_batches(
            [train[row] for row in rows], num_rows=recipe.train.batch_size, num_tokens=MICRO_BATCH_TOKENS
        )
    ]


def _activation_bytes(model: Any, *, num_rows: int, num_tokens: int, recompute: bool) -> int:
    """Sum what autograd keeps of one micro-batch, and the largest of it once more for its gradient."""
    import torch

    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in weights:
            kept[key] = tensor
        return tensor

    base = model.get_base_model()
    ids = torch.zeros(num_rows, num_tokens, dtype=torch.long, device="meta")
    # A mask that is ready: making one looks at values, which the meta device has not.
    mask = torch.zeros(num_rows, 1, num_tokens, num_tokens, dtype=base.dtype, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = base.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
    total, num_layers = sum(sizes), int(base.config.num_hidden_layers)
    if recompute:
        total = num_layers * output.numel() * output.element_size() + math.ceil(total / num_layers)
    return total + 2 * max(sizes, default=0)


def _runtime_bytes(device: str) -> int:
    """What this process holds with the same libraries loaded, and what running a step adds."""
    if device == "cuda":
        return 600 << 20  # the CUDA context and its libraries
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 + _RUNTIME_EXTRA_BYTES
    return _RUNTIME_EXTRA_BYTES


def _available_bytes(device: str) -> int | None:
    import torch

    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    path = Path("/proc/meminfo")
    for line in path.read_text().splitlines() if path.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
