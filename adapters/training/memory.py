"""What a run holds in memory, in bytes by part, beside full fine-tuning. Loads no weights.

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
from loractl.adapters.host_memory import free_memory
from loractl.adapters.training.batches import MICRO_BATCH_TOKENS, micro_batches, pass_shape, step_rows
from loractl.adapters.training.examples import Example
from loractl.adapters.training.loss import CHUNK_POSITIONS, can_pack
from loractl.adapters.training.recipe import Recipe

_ADAM_BYTES = 16  # float32 weight, gradient and two moments
# bitsandbytes' 8-bit Adam: float32 weight and gradient, two moments of a byte with a float32 scale for each 256.
_ADAM_8BIT_BYTES = 8 + 2 * (1 + 4 / 256)
_QUANTIZED_BYTES = {"int8": 1.0, "nf4": 0.5 + 0.127 / 8}
# Logits of a chunk: in the model's type, in float32, and the gradients of both.
_LOGIT_BYTES = 12
# What the process holds beyond tensors once a step has run: compiled products, threads' stacks, the allocator's slack.
_RUNTIME_EXTRA_BYTES = 160 << 20
# What the C allocator takes beyond what was asked for and cannot use again, as a share of activations: measured over
# the presets (RESULTS.md), the cause not taken apart.
_HOST_SLACK = 0.5


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
class Pass:
    """The largest rows that go through the model together, and the most learned tokens of any that do."""

    num_rows: int
    num_tokens: int
    num_learned: int


class Ledger:
    """The bytes of a run by part, on an empty model that carries the recipe's adapter."""

    def __init__(self, model: Any, recipe: Recipe, largest: Pass, *, device: str, runtime: int) -> None:
        self.model, self._largest, self._runtime = model, largest, runtime
        self._slack = 0.0 if device == "cuda" else _HOST_SLACK
        layers, self._other, self.num_parameters, self.num_modules = _count(model)
        linear = sum(layers)
        width: int = model.get_base_model().dtype.itemsize
        self._linear = linear
        self._base = round(linear * _QUANTIZED_BYTES.get(recipe.quantize, width)) + self._other * width
        if recipe.quantize == "int8" and device == "cpu" and recipe.train.expand_int8 is not False:
            self._base += linear * width
        is_8bit = device == "cuda" and recipe.train.optimizer != "adamw"
        self._adam_bytes = _ADAM_8BIT_BYTES if is_8bit else _ADAM_BYTES
        # A card's products with a quantized weight make it wide first, one layer's at a time.
        is_widened = device == "cuda" and recipe.quantize in _QUANTIZED_BYTES
        self._widened = max(layers, default=0) * width if is_widened else 0
        self._loss = min(largest.num_learned, CHUNK_POSITIONS) * int(model.config.vocab_size) * _LOGIT_BYTES

    def adapter(self, *, recompute: bool) -> Memory:
        """Count the run that trains the adapter alone."""
        adapter = round(self.num_parameters * self._adam_bytes)
        return self._memory(self._base, adapter, self._activations(recompute=recompute) + self._widened)

    def full(self, *, recompute: bool) -> Memory:
        """Count training every weight by mixed-precision Adam, without an adapter."""
        base = self.model.get_base_model()
        frozen = [parameter for parameter in base.parameters() if not parameter.requires_grad]
        with self.model.disable_adapter():
            base.requires_grad_(True)
            activations = self._activations(recompute=recompute)
        for parameter in frozen:
            parameter.requires_grad_(False)
        return self._memory(0, (self._linear + self._other) * _ADAM_BYTES, activations)

    def _memory(self, base: int, adapter: int, activations: int) -> Memory:
        runtime = self._runtime + round(self._slack * activations)
        return Memory(base=base, adapter=adapter, activations=activations, loss=self._loss, runtime=runtime)

    def _activations(self, *, recompute: bool) -> int:
        largest = self._largest
        return _activation_bytes(
            self.model, num_rows=largest.num_rows, num_tokens=largest.num_tokens, recompute=recompute
        )


def make_ledger(
    recipe: Recipe, folder: Path, micros: Sequence[Sequence[Example]], *, device: str
) -> tuple[Ledger, list[str]]:
    """Count for a base's folder and a run's micro-batches; returns the modules reached beside."""
    quiet_libraries()  # before transformers imports what speaks
    from transformers import AutoConfig

    dtype = pick_dtype(recipe.dtype, device=device)
    teach_layout(folder)
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    model, targets = empty_model(config, recipe, dtype=dtype, device=device)
    return Ledger(
        model, recipe, _largest(micros, packed=can_pack(model)), device=device, runtime=runtime_bytes(device)
    ), targets


@dataclass(frozen=True, slots=True)
class Fit:
    """How a run fits in memory, whether activations are computed again among it."""

    recompute: bool
    needed: Memory
    available_bytes: int


def fit_run(recipe: Recipe, ledger: Ledger, *, device: str) -> Fit:
    """Keep activations as the recipe says, else unless the run would not fit then."""
    recompute, available = bool(recipe.train.checkpoint_activations), available_bytes(device)
    needed = ledger.adapter(recompute=recompute)
    if recipe.train.checkpoint_activations is None and needed.total > available:
        recompute, needed = True, ledger.adapter(recompute=True)
    return Fit(recompute, needed, available)


def run_micro_batches(train: Sequence[Example], recipe: Recipe) -> list[list[Example]]:
    """All that goes through the model in a run, in order."""
    return [
        micro
        for rows in step_rows(len(train), recipe.train)
        for micro in micro_batches(
            [train[row] for row in rows], num_rows=recipe.train.batch_size, num_tokens=MICRO_BATCH_TOKENS
        )
    ]


def empty_model(config: Any, recipe: Recipe, *, dtype: Any, device: str) -> tuple[Any, list[str]]:
    """Make the base with its adapter on the meta device, as it will compute; returns it and the modules reached."""
    from accelerate import init_empty_weights
    from peft import LoraConfig, PeftConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from loractl.adapters.training.targets import resolve_targets

    attention = "eager" if device == "cpu" else "sdpa"
    with init_empty_weights(include_buffers=True):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    base.requires_grad_(False)
    part = recipe.adapter
    if part.start_from:
        lora: Any = PeftConfig.from_pretrained(part.start_from)
        lora.base_model_name_or_path, lora.inference_mode = None, False  # it goes on learning, over this base
        targets = sorted(lora.target_modules)
    else:
        targets = resolve_targets(base, part.targets)
        settings: Any = {"r": part.rank, "lora_alpha": part.alpha, "lora_dropout": part.dropout, "use_dora": part.dora}
        lora = LoraConfig(target_modules=targets, **settings)
    with warnings.catch_warnings():
        # PEFT asks a transformers model by a name that transformers has deprecated.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        model = get_peft_model(base, lora, low_cpu_mem_usage=True)
    return model.train(), targets


def runtime_bytes(device: str) -> int:
    """What this process holds with the same libraries loaded, and what running a step adds."""
    if device == "cuda":
        return 600 << 20  # the CUDA context and its libraries
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 + _RUNTIME_EXTRA_BYTES
    return _RUNTIME_EXTRA_BYTES


def available_bytes(device: str) -> int:
    """What the device has free, within the container's limit where there is one."""
    import torch

    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return free_memory().size_bytes


def _largest(micros: Sequence[Sequence[Example]], *, packed: bool) -> Pass:
    shapes = [pass_shape(micro, packed=packed) for micro in micros]
    num_rows, num_tokens = max(shapes, key=lambda shape: shape[0] * shape[1] ** 1.2)
    num_learned = max(sum(example.num_learned for example in micro) for micro in micros)
    return Pass(num_rows=num_rows, num_tokens=num_tokens, num_learned=num_learned)


def _count(model: Any) -> tuple[list[int], int, int, int]:
    """Count the weights of each linear layer, all other weights, the adapter's, and the layers that it reaches."""
    import torch

    from loractl.adapters.training.targets import linear_names

    base = model.get_base_model()
    names = linear_names(base)
    linear = [
        module.weight.numel()
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear)
        and ".lora_" not in name
        and name.removesuffix(".base_layer").rpartition(".")[2] in names
    ]
    adapter = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    every = sum(parameter.numel() for parameter in model.parameters())
    num_modules = sum(hasattr(module, "lora_A") for module in base.modules())
    return linear, every - adapter - sum(linear), adapter, num_modules


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
