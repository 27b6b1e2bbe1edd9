"""`adapter_config.json` as a typed value: which modules an adapter changes, at which rank and scale.

Matches names exactly as PEFT 0.21 does. Reads bytes, never imports PEFT or torch; refuses to know tensors and bases.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, cast

import msgspec
import regex

from loractl.adapters.digest import CONFIG_FILE
from loractl.adapters.errors import CheckFailed

MAX_CONFIG_BYTES = 1 << 20
MAX_PATTERN_LENGTH = 4096
MAX_PATTERNS = 4096
MAX_RANK = 1024
ALL_LINEAR = "all-linear"

# `re` cannot be stopped, so whatever a stranger wrote is matched by `regex`, which reads the same language.
_MATCH_TIMEOUT_S = 0.05

Bias = Literal["none", "all", "lora_only"]


class LoraSpec(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """The fields of PEFT 0.21's LoraConfig that change what is computed or how it is stored."""

    peft_type: str
    r: int = 8
    lora_alpha: float = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    use_qalora: bool = False
    lora_bias: bool = False
    bias: Bias = "none"
    fan_in_fan_out: bool = False
    lora_dropout: float = 0.0
    init_lora_weights: bool | str | None = True
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    layer_replication: list[tuple[int, int]] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    alora_invocation_tokens: list[int] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    peft_version: str | None = None
    auto_mapping: dict[str, Any] | None = None
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = None
    loftq_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    use_bdlora: dict[str, Any] | None = None
    inference_mode: bool | None = None
    ensure_weight_tying: bool = False

    def rank_of(self, module: str) -> int:
        """The rank at a module, named as in the base (`model.layers.0.self_attn.q_proj`)."""
        key = self._rank_keys(module)
        return self.r if key is None or self.rank_pattern is None else self.rank_pattern[key]

    def alpha_of(self, module: str) -> float:
        """The alpha at a module."""
        key = self._alpha_keys(module)
        return self.lora_alpha if key is None or self.alpha_pattern is None else self.alpha_pattern[key]

    def scaling_of(self, module: str) -> float:
        """What `B A x` is multiplied with at a module: alpha/r, or alpha/sqrt(r) with rsLoRA."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def max_rank(self) -> int:
        """The largest rank that any module can have."""
        return max(self.r, *(self.rank_pattern or {"": self.r}).values())

    def targets(self, module: str) -> bool:
        """Tell whether PEFT would put a LoRA on a module of this name (its kind is not looked at)."""
        if self._excluded(module) or self.keeps(module):
            return False
        if self.target_modules is None:
            return False
        if isinstance(self.target_modules, str):
            return self.target_modules == ALL_LINEAR or self._target_expression.fullmatch(module)
        if module in self._target_names:
            return True
        if not any(suffix in self._target_names for suffix in _suffixes(module)):
            return False
        return self._layer_is_meant(module)

    def keeps(self, module: str) -> bool:
        """Tell whether a module is saved whole (`modules_to_save`), or lies inside one that is."""
        return any(matcher.match(module) for matcher in self._kept)

    def target_of(self, module: str) -> str | None:
        """Which entry of a list of targets a module matches; None where targets are an expression."""
        return next((name for name in _suffixes(module) if name in self._target_names), None)

    # What follows is derived once per spec; `dict=True` gives cached_property its place.

    @cached_property
    def _target_names(self) -> frozenset[str]:
        return frozenset(self.target_modules) if isinstance(self.target_modules, list) else frozenset()

    @cached_property
    def _target_expression(self) -> "_Matcher":
        return _Matcher(cast("str", self.target_modules))

    @cached_property
    def _rank_keys(self) -> "Callable[[str], str | None]":
        return _first_key(list(self.rank_pattern or ()))

    @cached_property
    def _alpha_keys(self) -> "Callable[[str], str | None]":
        return _first_key(list(self.alpha_pattern or ()))

    @cached_property
    def _kept(self) -> "list[_Matcher]":
        return [_Matcher(rf"(^|.*\.){name}($|\..*)") for name in self.modules_to_save or ()]

    def _excluded(self, module: str) -> bool:
        if not self.exclude_modules:
            return False
        if isinstance(self.exclude_modules, str):
            return _Matcher(self.exclude_modules).fullmatch(module)
        return any(suffix in self.exclude_modules for suffix in _suffixes(module))

    def _layer_is_meant(self, module: str) -> bool:
        layers = self.layers_to_transform
        if layers is None or layers == []:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []
        expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns if pattern]
        for expression in expressions or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
            index = _Matcher(expression).group(module, "idx")
            if index is not None:
                return int(index) in (layers if isinstance(layers, list) else [layers])
        return False


@dataclass(frozen=True, slots=True)
class ParsedConfig:
    """A config that was read, and the names of keys that PEFT 0.21 does not know."""

    spec: LoraSpec
    unknown_keys: tuple[str, ...] = field(default=())


def read_config(data: bytes, *, where: str = CONFIG_FILE) -> LoraSpec:
    """Read and check a LoRA config; raises CheckFailed (E_CFG) naming the field that is wrong."""
    return parse_config(data, where=where).spec


def parse_config(data: bytes, *, where: str = CONFIG_FILE) -> ParsedConfig:
    """As `read_config`, and tell which keys are unknown."""
    document = read_json_object(data, where=where)
    try:
        spec = msgspec.convert(document, LoraSpec)
    except msgspec.ValidationError as error:
        raise _invalid(where, str(error).replace("`$.", "`")) from error
    if spec.peft_type != "LORA":
        raise _invalid(where, f"peft_type is {spec.peft_type!r}, not LORA")
    _check_numbers(spec, where=where)
    _check_patterns(spec, where=where)
    if not (spec.target_modules or spec.target_parameters or spec.modules_to_save or spec.trainable_token_indices):
        raise _invalid(where, "target_modules is empty: the adapter changes nothing")
    return ParsedConfig(spec, tuple(sorted(document.keys() - _KNOWN_KEYS)))


def read_json_object(data: bytes, *, where: str) -> dict[str, Any]:
    """Read a small JSON object; refuses duplicate keys, which two readers could take differently (E_CFG)."""
    if len(data) > MAX_CONFIG_BYTES:
        raise _invalid(where, f"{len(data):,} bytes are over the limit of {MAX_CONFIG_BYTES:,}")
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _invalid(where, "nested too deep" if isinstance(error, RecursionError) else str(error)) from error
    if not isinstance(document, dict):
        raise _invalid(where, "not a JSON object")
    return document


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key appears twice")
    return document


def _check_numbers(spec: LoraSpec, *, where: str) -> None:
    for name, rank in [("r", spec.r), *(spec.rank_pattern or {}).items()]:
        if not 1 <= rank <= MAX_RANK:
            raise _invalid(where, f"{name} is {rank}; a rank is 1 to {MAX_RANK}")
    for name, alpha in [("lora_alpha", spec.lora_alpha), *(spec.alpha_pattern or {}).items()]:
        if not (math.isfinite(alpha) and alpha > 0):
            raise _invalid(where, f"{name} is {alpha}; an alpha is a finite number above 0")


def _check_patterns(spec: LoraSpec, *, where: str) -> None:
    for name, patterns in _patterns(spec).items():
        if len(patterns) > MAX_PATTERNS:
            raise _invalid(where, f"{name} has {len(patterns):,} entries, the limit is {MAX_PATTERNS:,}")
        for pattern in patterns:
            if len(pattern) > MAX_PATTERN_LENGTH:
                raise _invalid(where, f"{name}: an expression is over {MAX_PATTERN_LENGTH:,} characters")
            try:
                re.compile(pattern)  # what PEFT will do
                regex.compile(pattern, regex.VERSION0)
            except (re.error, regex.error, OverflowError, RecursionError) as error:
                raise _invalid(where, f"{name}: {pattern[:80]!r} is not an expression: {error}") from error


def _patterns(spec: LoraSpec) -> dict[str, list[str]]:
    """Every text of a config that PEFT uses as a regular expression, by field."""
    layers = spec.layers_pattern or []
    return {
        "target_modules": [spec.target_modules] if isinstance(spec.target_modules, str) else [],
        "exclude_modules": [spec.exclude_modules] if isinstance(spec.exclude_modules, str) else [],
        "rank_pattern": list(spec.rank_pattern or ()),
        "alpha_pattern": list(spec.alpha_pattern or ()),
        "modules_to_save": list(spec.modules_to_save or ()),
        "layers_pattern": [layers] if isinstance(layers, str) else layers,
    }


class _Matcher:
    """One expression, matched within a time limit."""

    def __init__(self, expression: str) -> None:
        self._compiled: Any = regex.compile(expression, regex.VERSION0)

    def match(self, text: str) -> bool:
        return self._run(self._compiled.match, text) is not None

    def fullmatch(self, text: str) -> bool:
        return self._run(self._compiled.fullmatch, text) is not None

    def group(self, text: str, name: str) -> str | None:
        match = self._run(self._compiled.match, text)
        return None if match is None else str(match.group(name))

    def _run(self, method: Callable[..., Any], text: str) -> Any:
        try:
            return method(text, timeout=_MATCH_TIMEOUT_S)
        except TimeoutError as error:
            shown = self._compiled.pattern[:80]
            raise CheckFailed(
                f"{CONFIG_FILE}: the expression {shown!r} takes too long on {text[:80]!r}",
                check="E_CFG",
                hint="list the modules by name",
            ) from error


def _first_key(keys: list[str]) -> Callable[[str], str | None]:
    """PEFT's get_pattern_key: the first key that a module's name ends with, as an expression."""
    # Keys are mostly plain names, whose last part must stand at the end; that check is fifty times cheaper.
    prepared = [(key, _literal_tail(key), _Matcher(rf"(.*\.)?({key})$")) for key in keys]

    def find(module: str) -> str | None:
        return next((key for key, tail, matcher in prepared if module.endswith(tail) and matcher.match(module)), None)

    return find


def _literal_tail(key: str) -> str:
    return key.rpartition(".")[2] if re.fullmatch(r"[A-Za-z0-9_.]+", key) else ""


def _suffixes(module: str) -> list[str]:
    """`a.b.c` -> `a.b.c`, `b.c`, `c`: what a listed target may equal."""
    parts = module.split(".")
    return [".".join(parts[index:]) for index in range(len(parts))]


def _invalid(where: str, reason: str) -> CheckFailed:
    return CheckFailed(f"{where}: {reason}", check="E_CFG")


# Keys that PEFT 0.15 to 0.21 write and that neither change the arithmetic nor the files.
_KNOWN_KEYS = frozenset(LoraSpec.__struct_fields__) | {
    "arrow_config",
    "eva_config",
    "kasa_config",
    "lora_ga_config",
    "monteclora_config",
    "qalora_group_size",
    "runtime_config",
    "velora_config",
}
