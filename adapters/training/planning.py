"""What a run would take: rows, tokens, steps, memory, and the time of a probe. Loads no weights but for the probe."""

import math
from dataclasses import dataclass

from loractl.adapters.training.batches import num_steps, pass_shape
from loractl.adapters.training.data_summary import DataSummary
from loractl.adapters.training.loss import can_pack
from loractl.adapters.training.memory import Memory, fit_run, make_ledger, run_micro_batches
from loractl.adapters.training.recipe import Recipe
from loractl.adapters.training.rows import rows_digest
from loractl.adapters.training.run import Inputs, prepare, resolve_numbers


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
    available_bytes: int
    device: str
    seconds: float | None = None
    """Length of the run by a probe, where one was made."""

    @property
    def fits(self) -> bool:
        """Whether the peak is below what the device has free."""
        return self.memory.total <= self.available_bytes


def make_plan(recipe: Recipe, inputs: Inputs | None = None) -> Plan:
    """Plan a run, reading its data where `inputs` are not given; raises what `train` would before its first step."""
    import torch

    recipe = resolve_numbers(recipe)
    inputs = inputs or prepare(recipe)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    micros = run_micro_batches(inputs.train, recipe)
    ledger, targets = make_ledger(recipe, inputs.folder, micros, device=device)
    lora, packed = ledger.model.peft_config["default"], can_pack(ledger.model)
    fit = fit_run(recipe, ledger, device=device)
    return Plan(
        base_id=inputs.identity.id,
        base_fingerprint=inputs.identity.fingerprint,
        base_chat_template_sha256=inputs.identity.chat_template_sha256,
        quantize=recipe.quantize,
        dtype=str(ledger.model.get_base_model().dtype).removeprefix("torch."),
        data=inputs.summary,
        data_digest=rows_digest(inputs.rows),
        rank=lora.r,
        alpha=lora.lora_alpha,
        targets=tuple(targets),
        num_modules=ledger.num_modules,
        num_parameters=ledger.num_parameters,
        learning_rate=float(recipe.train.learning_rate),
        epochs=recipe.train.epochs,
        num_steps=num_steps(len(inputs.train), recipe.train),
        rows_per_step=recipe.train.batch_size * recipe.train.accumulation,
        num_padded_tokens=sum(math.prod(pass_shape(micro, packed=packed)) for micro in micros),
        checkpoint_activations=fit.recompute,
        memory=fit.needed,
        full_fine_tuning=ledger.full(recompute=fit.recompute),
        available_bytes=fit.available_bytes,
        device=device,
    )


def probe_seconds(recipe: Recipe, inputs: Inputs, plan: Plan) -> float:
    """Load the base, run forward and backward on the two longest rows, and scale to the whole run."""
    import time

    from loractl.adapters.base_loading import load_base_model
    from loractl.adapters.training.loss import summed_loss
    from loractl.adapters.training.preference import Reference, pair_sums
    from loractl.adapters.training.trunk import Trunk

    recipe = resolve_numbers(recipe)
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
    num_tokens = math.prod(pass_shape(rows, packed=can_pack(trunk.model)))
    return seconds / num_tokens * plan.num_padded_tokens
