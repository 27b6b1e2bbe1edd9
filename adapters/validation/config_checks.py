"""Checks of what an adapter says about itself: its config, its manifest and its card. Opens no weights."""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from loractl.adapters.config import LoraSpec
from loractl.adapters.manifest import Manifest
from loractl.adapters.reference import is_digest
from loractl.adapters.validation.record import Finding, Policy

_TRUSTED_LIBRARIES = {"transformers", "diffusers"}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PATH_LIKE = re.compile(r"(?:[./~\\]|[A-Za-z]:[\\/]|.*\\)")
_CARD_KEYS = ("base_model", "license", "datasets")
_MAX_FRONT_MATTER = 64 << 10


def check_imports(document: dict[str, Any], *, path: str) -> Iterator[Finding]:
    """Refuse a config that would make PEFT import a module or run repository code."""
    auto_mapping = document.get("auto_mapping")
    library = auto_mapping.get("parent_library") if isinstance(auto_mapping, dict) else None
    if auto_mapping is not None and str(library).split(".")[0] not in _TRUSTED_LIBRARIES:
        yield _reject("E_IMPORT", f"{path}: auto_mapping names the library {str(library)[:80]!r}", path)
    if document.get("megatron_config") is not None:
        yield _reject("E_IMPORT", f"{path}: megatron_config makes PEFT import the module it names", path)
    elif document.get("megatron_core") not in {None, "megatron.core"}:
        yield _reject("E_IMPORT", f"{path}: megatron_core names a module to import", path)


def find_remote_code(document: object) -> str | None:
    """Name a key of a JSON document that makes a loader run code from a repository; looks three levels deep."""
    level: list[object] = [document]
    for _ in range(3):
        below: list[object] = []
        for value in level:
            if isinstance(value, dict):
                if "auto_map" in value:
                    return "auto_map"
                if value.get("trust_remote_code"):
                    return "trust_remote_code"
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
        level = below
    return None


def check_local_path(spec: LoraSpec, *, path: str, policy: Policy) -> Iterator[Finding]:
    """Find a base that is named by a path: it says where one person kept it, not what it is."""
    base = spec.base_model_name_or_path
    if policy.local_path == "off":
        return
    hint = "write the base's repo id, such as ORG/NAME, into base_model_name_or_path"
    if not base:
        message = f"{path}: base_model_name_or_path is empty"
        yield Finding(code="E_LOCALPATH", level=policy.local_path, message=message, hint=hint, path=path)
    elif _PATH_LIKE.match(base) or base.count("/") > 1:
        message = f"{path}: base_model_name_or_path is a path: {base[:120]!r}"
        yield Finding(code="E_LOCALPATH", level=policy.local_path, message=message, hint=hint, path=path)
    files = [*(spec.corda_config or {}).items(), *(spec.loftq_config or {}).items()]
    for key, value in files:
        if isinstance(value, str) and key.endswith("_file"):
            message = f"{path}: {key} is a path: {value[:120]!r}"
            yield Finding(code="E_LOCALPATH", level=policy.local_path, message=message, path=path)


def check_base_pin(
    spec: LoraSpec, manifest: Manifest | None, *, path: str, policy: Policy, expected_fingerprint: str | None
) -> Iterator[Finding]:
    """Find an adapter without a pinned base, or pinned to another one than its line of versions."""
    pin = manifest.base if manifest is not None else None
    if pin is None:
        if policy.base_pin != "off":
            yield Finding(
                code="E_BASE_PIN",
                level=policy.base_pin,
                message=f"{path}: no loractl.json pins the base: nobody can tell which weights this belongs to",
                hint="push with `loractl push --base FOLDER`",
                path=path,
            )
        return
    if not is_digest(pin.fingerprint):
        yield _reject("E_BASE_PIN", f"{path}: base.fingerprint is not sha256: and 64 hex digits", path)
    if pin.revision is not None and not _COMMIT.fullmatch(pin.revision):
        yield _reject("E_BASE_PIN", f"{path}: base.revision is not a commit of 40 hex digits", path)
    if pin.revision is not None and spec.revision not in {None, "", "main", pin.revision}:
        message = f"{path}: base.revision is {pin.revision[:12]}, adapter_config.json says {str(spec.revision)[:40]}"
        yield _reject("E_BASE_PIN", message, path)
    if expected_fingerprint is not None and pin.fingerprint != expected_fingerprint:
        message = f"{path}: another base ({pin.fingerprint[:19]}) than this repo's ({expected_fingerprint[:19]})"
        hint = "a repo is one line of versions on one base; push to another name"
        yield Finding(code="E_BASE_PIN", level="reject", message=message, hint=hint, path=path)


def check_serving(spec: LoraSpec, *, path: str, policy: Policy) -> Iterator[Finding]:
    """Tell what serving engines will not take, at push and not at night."""
    features = {
        f"rank {spec.max_rank} is above {policy.max_rank}": spec.max_rank > policy.max_rank,
        "modules_to_save holds whole modules": bool(spec.modules_to_save),
        f"bias={spec.bias} changes the base's biases": spec.bias != "none",
        "DoRA rescales the base's weights": spec.use_dora,
        "lora_bias adds biases": spec.lora_bias,
        "trainable_token_indices changes embeddings": bool(spec.trainable_token_indices),
        "target_parameters changes bare parameters": bool(spec.target_parameters),
        "layer_replication changes the base's depth": bool(spec.layer_replication),
        "invocation tokens (aLoRA) need a special engine": bool(spec.alora_invocation_tokens),
    }
    for feature in (name for name, present in features.items() if present):
        message = f"{path}: {feature}; loractl's server and vLLM do not serve it by default"
        yield Finding(code="W_SERVE", level="warn", message=message, path=path)


def check_card(text: str | None, *, path: str) -> Iterator[Finding]:
    """Tell which of base, license and data the card's front matter leaves out."""
    if text is None:
        message = f"{path}: no README.md: nobody can tell what the adapter is for"
        yield Finding(code="W_CARD", level="warn", message=message, path=path)
        return
    front_matter = _front_matter(text)
    missing = [key for key in _CARD_KEYS if not front_matter.get(key)]
    if missing:
        message = f"{path}: the card's front matter lacks {', '.join(missing)}"
        yield Finding(code="W_CARD", level="warn", message=message, path=path)


def _front_matter(text: str) -> dict[str, Any]:
    head = text[: _MAX_FRONT_MATTER + 8]
    match = re.match(r"---\r?\n(.*?)\r?\n---", head, re.DOTALL)
    if match is None:
        return {}
    try:
        value = yaml.safe_load(match.group(1))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _reject(code: str, message: str, path: str) -> Finding:
    return Finding(code=code, level="reject", message=message, path=path)
