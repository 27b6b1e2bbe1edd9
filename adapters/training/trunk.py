"""One frozen base with every adapter that trains on it; one adapter is active at a time. Knows no data and no files.

PEFT makes and holds the adapters. Those that begin as a part of the base's weights (pissa, olora) get a frozen twin
that takes this beginning away again, so that the base itself stays what every other adapter, and the server, has.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.utils.integrations import dequantize_module_weight

from loractl.adapters.training.batches import collate
from loractl.adapters.training.examples import Example
from loractl.adapters.training.frozen_int8 import Int8Layers
from loractl.adapters.training.recipe import Recipe
from loractl.adapters.training.targets import resolve_targets

_TWIN = "_start"
_FROM_BASE = {"pissa", "olora"}
_EVA_ROWS = 32
_EVA_BATCH_ROWS = 4


class Trunk:
    """The shared base; `attach` every adapter first, then `ready` it, then train."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self.model: Any = None
        self._int8: Int8Layers | None = None
        self._active: tuple[str, bool] | None = None
        self._twins: set[str] = set()

    @property
    def device(self) -> torch.device:
        device: torch.device = self.base.device
        return device

    def attach(
        self, name: str, recipe: Recipe, *, revision: str | None, examples: Sequence[Example], fresh: bool
    ) -> torch.Tensor:
        """Add an adapter, seeded by its recipe, and return where its random numbers go on.

        `fresh` is False where a checkpoint brings its weights.
        """
        torch.manual_seed(recipe.train.seed)
        with warnings.catch_warnings():
            # PEFT asks a transformers model by a name that transformers has deprecated.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            if recipe.adapter.start_from:
                self._load(name, Path(recipe.adapter.start_from))
                return random_state(self.device)
            config = _config(self.base, recipe, revision)
            self._add(name, config)
            if recipe.adapter.init in _FROM_BASE:
                self._add(name + _TWIN, _config(self.base, recipe, revision))
                self._twins.add(name)
                self._start_from_base(name, recipe.adapter.init)
            elif recipe.adapter.init == "eva" and fresh:
                self._start_from_data(name, examples)
                config.eva_config, config.init_lora_weights = (
                    None,
                    True,
                )
        return random_state(self.device)

    def ready(self, *, quantize: str, expand_int8: bool) -> None:
        """Choose how the base computes while it trains; no adapter can be attached after this."""
        if self.device.type == "cpu":
            # Torch's fused attention takes a fifth more time than plain products here, for short padded rows.
            self.base.set_attn_implementation("eager")
        if quantize == "int8":
            self._int8 = Int8Layers(self.model, expand=expand_int8 and self.device.type == "cpu", dtype=self.base.dtype)

    def activate(self, name: str, *, recompute: bool = False) -> None:
        """Make one adapter the one that computes and learns, in training mode."""
        self.model.train()
        if self._active == (name, recompute):
            return
        self._activate_all([name])
        if recompute:
            _recompute(self.base, "enable", {"use_reentrant": False})
        elif self._active is not None and self._active[1]:
            _recompute(self.base, "disable")
        self._active = (name, recompute)

    def activate_group(self, names: Sequence[str]) -> None:
        """Let several adapters learn; their rows are told apart by whoever computes them."""
        self.model.train()
        self._activate_all(names)
        self._active = None

    def _activate_all(self, names: Sequence[str]) -> None:
        everything = [one for name in names for one in ([name, name + _TWIN] if name in self._twins else [name])]
        self.model.set_adapter(names[0])
        self.model.base_model.set_adapter(everything)
        for name in set(names) & self._twins:
            for _, parameter in self._named(name + _TWIN):
                parameter.requires_grad_(False)

    @contextmanager
    def without_adapter(self, name: str) -> Iterator[None]:
        """Compute with the base alone while `name` is the active one."""
        try:
            with self.model.disable_adapter():
                yield
        finally:
            self._activate_all([name])  # PEFT lets a frozen twin learn when it switches adapters on again

    @contextmanager
    def as_served(self, name: str) -> Iterator[None]:
        """Compute in eval mode, in the arithmetic that serves, with one adapter active."""
        self.activate(name)
        self.model.eval()
        with self._int8.as_served() if self._int8 else nullcontext():
            yield

    def parameters(self, name: str) -> list[tuple[str, torch.nn.Parameter]]:
        """List an adapter's trainable parameters under names that do not hold its own."""
        return self._named(name)

    def start(self, name: str) -> list[tuple[str, torch.nn.Parameter]]:
        """List the frozen beginning of an adapter that began as a part of the base, else nothing."""
        return self._named(name + _TWIN) if name in self._twins else []

    def remove(self, name: str) -> None:
        """Forget an adapter and free its memory; the last one stays, for a model needs one."""
        if len(self.model.peft_config) - len(self._twins) > 1:
            others = [one for one in self.model.peft_config if one not in {name, name + _TWIN} and _TWIN not in one]
            self._activate_all(others[:1])
            self._active = None
            for one in [name, name + _TWIN] if name in self._twins else [name]:
                self.model.delete_adapter(one)
            self._twins.discard(name)

    def _named(self, name: str) -> list[tuple[str, torch.nn.Parameter]]:
        mark = f".{name}."
        return [
            (full.replace(mark, "."), parameter)
            for full, parameter in self.model.named_parameters()
            if mark in full and "lora_" in full
        ]

    def _add(self, name: str, config: LoraConfig) -> None:
        if self.model is None:
            self.model = get_peft_model(self.base, config, adapter_name=name)
        else:
            self.model.add_adapter(name, config)

    def _load(self, name: str, folder: Path) -> None:
        if self.model is None:
            self.model = PeftModel.from_pretrained(self.base, str(folder), adapter_name=name, is_trainable=True)
        else:
            self.model.load_adapter(str(folder), name, is_trainable=True)

    def _start_from_base(self, name: str, init: Any) -> None:
        """Let PEFT take A and B from a float copy of each weight, one layer at a time."""
        for layer in self._layers(name):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            weight = dequantize_module_weight(layer.get_base_layer()).detach().float().clone()
            plain.weight = torch.nn.Parameter(weight, requires_grad=False)
            config = self.model.peft_config[name]
            settings = LoraConfig(
                r=config.r, lora_alpha=config.lora_alpha, use_rslora=config.use_rslora, init_lora_weights=init
            )
            made = LoraLinear(plain, name, settings, r=config.r, lora_alpha=config.lora_alpha)
            for part, sign in (("lora_A", 1.0), ("lora_B", -1.0)):
                start = getattr(made, part)[name].weight.detach().float()
                held, twin = getattr(layer, part)[name].weight, getattr(layer, part)[name + _TWIN].weight
                held.data = start.to(held.device, held.dtype).clone()
                twin.data = (sign * start).to(twin.device, twin.dtype)

    def _start_from_data(self, name: str, examples: Sequence[Example]) -> None:
        # Only now: PEFT would make an adapter that waits for its data without weights.
        config = self.model.peft_config[name]
        config.eva_config, config.init_lora_weights = EvaConfig(rho=1.0), "eva"  # ranks as asked, in every layer
        self._activate_all([name])
        rows = list(examples[:_EVA_ROWS])
        batches = []
        for first in range(0, len(rows) - len(rows) % _EVA_BATCH_ROWS or len(rows), _EVA_BATCH_ROWS):
            tensors = collate(rows[first : first + _EVA_BATCH_ROWS], self.device)
            batches.append({"input_ids": tensors.ids, "attention_mask": tensors.attended})
        self.model.eval()
        initialize_lora_eva_weights(self.model, batches, adapter_name=name, show_progress_bar=False)

    def _layers(self, name: str) -> list[Any]:
        return [module for module in self.model.modules() if isinstance(module, LoraLayer) and name in module.lora_A]


def _config(base: Any, recipe: Recipe, revision: str | None) -> LoraConfig:
    part = recipe.adapter
    init: Any = part.init if part.init in {"gaussian", "orthogonal"} else True
    return LoraConfig(
        r=part.rank,
        lora_alpha=part.alpha,  # pyright: ignore[reportArgumentType] - PEFT scales by any number
        lora_dropout=part.dropout,
        target_modules=resolve_targets(base, part.targets),
        use_rslora=part.rslora,
        use_dora=part.dora,
        init_lora_weights=init,
        task_type="CAUSAL_LM",
        revision=revision,
    )


def _recompute(base: Any, verb: str, *settings: Any) -> None:
    """Switch activation checkpointing, by whichever of its two names this transformers has."""
    name = "activation" if hasattr(base, f"activation_checkpointing_{verb}") else "gradient"
    getattr(base, f"{name}_checkpointing_{verb}")(*settings)


def random_state(device: torch.device) -> torch.Tensor:
    """Return the state of every generator that training draws from, as bytes."""
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state


def set_random_state(state: torch.Tensor, device: torch.device) -> None:
    """Go back to a state that `random_state` returned."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].clone())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[size:].clone(), device)
