"""Checks of an adapter's tensors against its config and its base: pairs, shapes, targets, values."""

from collections.abc import Callable, Iterator

import numpy as np

from loractl.adapters.config import ALL_LINEAR, LoraSpec
from loractl.adapters.layout import LoraLayout, LoraModule
from loractl.adapters.tensors import TensorFile
from loractl.adapters.validation.base_shapes import BaseShapes
from loractl.adapters.validation.record import Finding
from loractl.adapters.weight_change import change_norm

_MAX_REPORTED = 8
_SERVED_DTYPES = {"F32", "F16", "BF16"}
_NORM_OUTLIER = 1000.0
_MAX_SCALING = 1000.0

Report = Callable[[str], Finding]


def check_pairs(layout: LoraLayout, spec: LoraSpec, *, path: str) -> Iterator[Finding]:
    """Refuse an A without its B, and shapes that disagree with each other or with the config's rank."""

    def reject(message: str) -> Finding:
        return Finding(code="E_AB", level="reject", message=f"{path}: {message}", path=path)

    dtypes = {part.dtype for module in layout.modules.values() for part in (module.a, module.b) if part}
    if strange := sorted(dtypes - _SERVED_DTYPES):
        message = f"{path}: weights in {', '.join(strange)}; servers take F32, F16 and BF16"
        yield Finding(code="E_AB", level="warn", message=message, path=path)
    faults = (fault for module in layout.modules.values() if (fault := _pair_fault(module, spec)) is not None)
    yield from _at_most(faults, reject)


def _pair_fault(module: LoraModule, spec: LoraSpec) -> str | None:
    name, a, b = module.name, module.a, module.b
    if a is None or b is None:
        return f"{name} has {'lora_B without lora_A' if a is None else 'lora_A without lora_B'}"
    if a.dtype != b.dtype:
        return f"{name}: lora_A is {a.dtype}, lora_B is {b.dtype}"
    if len(a.shape) != len(b.shape) or len(a.shape) not in {2, 3, 4, 5} or (module.is_embedding and len(a.shape) != 2):
        return f"{name}: lora_A {list(a.shape)} and lora_B {list(b.shape)} are no pair of matrices"
    # Bare parameters of expert layers hold all experts' A side by side.
    factor = a.shape[0] // spec.rank_of(name) if spec.target_parameters and not spec.targets(name) else 1
    rank = spec.rank_of(name) * max(factor, 1)
    if a.shape[0] != rank or b.shape[1] != rank:
        return f"{name}: lora_A {list(a.shape)} and lora_B {list(b.shape)}, but the config gives it rank {rank}"
    if module.magnitude is not None and module.magnitude.size_bytes != _vector_bytes(module):
        return f"{name}: the DoRA magnitude {list(module.magnitude.shape)} does not match {b.shape[0]} outputs"
    if spec.use_dora and module.magnitude is None:
        return f"{name}: use_dora is set, but there is no magnitude"
    if module.bias is not None and module.bias.shape != (b.shape[0],):
        return f"{name}: the bias {list(module.bias.shape)} does not match {b.shape[0]} outputs"
    return None


def _vector_bytes(module: LoraModule) -> int:
    assert module.magnitude is not None
    assert module.b is not None
    element_bytes = module.magnitude.size_bytes // max(1, int(np.prod(module.magnitude.shape)))
    return element_bytes * module.b.shape[0]


def check_targets(layout: LoraLayout, spec: LoraSpec, *, path: str) -> Iterator[Finding]:
    """Refuse tensors that the config does not announce, and targets that no tensor belongs to."""

    def reject(message: str) -> Finding:
        return Finding(code="E_TARGETS", level="reject", message=f"{path}: {message}", path=path)

    if layout.without_prefix:
        yield reject(f"{layout.without_prefix[0]} does not begin with base_model.model.: PEFT would not load it")
        return
    announced = [name for name in layout.modules if _is_announced(name, spec)]
    strange = (name for name in layout.modules if name not in set(announced))
    yield from _at_most((f"{name} is not among target_modules" for name in strange), reject)
    if isinstance(spec.target_modules, list) and not (spec.layers_to_transform or spec.exclude_modules):
        seen = {spec.target_of(name) for name in announced}
        unseen = sorted(name for name in spec.target_modules if name not in seen and not spec.keeps(name))
        yield from _at_most((f"target {name} has no tensors" for name in unseen), reject)
    elif not announced and spec.target_modules and spec.target_modules != ALL_LINEAR:
        yield reject("no tensor belongs to target_modules")
    whole = (name for name in layout.whole if not spec.keeps(name) and not _is_allowed_bias(name, spec))
    yield from _at_most((f"{name} is neither a LoRA weight nor in modules_to_save" for name in whole), reject)
    for name in layout.base_weights:
        if not spec.keeps(name) and not spec.targets(name):
            yield reject(f"{name}.base_layer holds a weight of the base")
    if layout.tokens and not spec.trainable_token_indices:
        yield reject(f"{next(iter(layout.tokens))} holds trained tokens, but trainable_token_indices is empty")


def _is_announced(name: str, spec: LoraSpec) -> bool:
    if spec.targets(name):
        return True
    # `experts.gate_up_proj` puts its LoRA on the module `experts`, a second parameter one `base_layer` deeper.
    holder = name.removesuffix(".base_layer")
    holders = {parameter.rpartition(".")[0] for parameter in spec.target_parameters or ()}
    return any(f".{holder}".endswith(f".{known}") for known in holders)


def _is_allowed_bias(name: str, spec: LoraSpec) -> bool:
    return spec.bias != "none" and name.endswith(".bias")


def check_base_shapes(layout: LoraLayout, base: BaseShapes, *, path: str) -> Iterator[Finding]:
    """Refuse modules that the base lacks or has in other sizes."""

    def reject(message: str) -> Finding:
        return Finding(code="E_BASE_SHAPE", level="reject", message=f"{path}: {message}", path=path)

    faults = (fault for module in layout.modules.values() if (fault := _shape_fault(module, base)) is not None)
    yield from _at_most(faults, reject)


def _shape_fault(module: LoraModule, base: BaseShapes) -> str | None:
    if base.layer_is_missing(module.name):
        return f"{module.name}: the base has {base.num_layers} layers"
    expected = base.of(module.name)
    if module.a is None or module.b is None or expected is None or len(expected) != 2 or len(module.a.shape) != 2:
        return None
    # An embedding's weight is [vocabulary, hidden]: its "in" comes first.
    out_size, in_size = expected[::-1] if module.is_embedding else expected
    found = (module.b.shape[0], module.a.shape[1])
    if found != (out_size, in_size):
        return f"{module.name}: made for {found[1]} -> {found[0]}, the base has {in_size} -> {out_size}"
    return None


def check_values(tensors: TensorFile, layout: LoraLayout, spec: LoraSpec, *, path: str) -> Iterator[Finding]:
    """Refuse NaN and infinities; tell of an adapter that changes nothing, or far too much."""
    if (broken := tensors.first_not_finite()) is not None:
        message = f"{path}: {broken} holds NaN or infinite values"
        hint = "training diverged; take an earlier checkpoint or a lower learning rate"
        yield Finding(code="E_NONFINITE", level="reject", message=message, hint=hint, path=path)
        return
    norms = {
        module.name: change_norm(tensors, module, scaling=spec.scaling_of(module.name))
        for module in layout.modules.values()
        if module.a is not None and module.b is not None
    }
    if norms and max(norms.values()) == 0.0:
        message = f"{path}: every lora_B or lora_A is zero: the adapter changes nothing"
        hint = "the adapter was saved before its first training step"
        yield Finding(code="W_ZERO_B", level="warn", message=message, hint=hint, path=path)
        return
    yield from _check_norms(norms, spec, path=path)


def _check_norms(norms: dict[str, float], spec: LoraSpec, *, path: str) -> Iterator[Finding]:
    if not norms:
        return
    median = float(np.median([norm for norm in norms.values() if norm > 0]))
    largest = max(norms, key=lambda name: norms[name])
    if norms[largest] > _NORM_OUTLIER * median or not np.isfinite(norms[largest]):
        message = f"{path}: {largest} changes its weight by {norms[largest]:.3g}, the median module by {median:.3g}"
        yield Finding(code="W_NORM", level="warn", message=message, path=path)
    if (steepest := max(spec.scaling_of(name) for name in norms)) > _MAX_SCALING:
        message = f"{path}: alpha over rank is {steepest:.3g}"
        yield Finding(code="W_NORM", level="warn", message=message, path=path)


def _at_most(faults: Iterator[str], report: Report) -> Iterator[Finding]:
    """Report the first few faults of one kind and count the rest."""
    rest = 0
    for index, fault in enumerate(faults):
        if index < _MAX_REPORTED:
            yield report(fault)
        else:
            rest += 1
    if rest:
        yield report(f"and {rest:,} more of this kind")
