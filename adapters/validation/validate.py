"""Runs every check on a tree of files and collects what they find; the order is cheap to dear."""

import hashlib
import json
from collections.abc import Generator, Iterator
from pathlib import PurePosixPath

from loractl.adapters.config import MAX_CONFIG_BYTES, LoraSpec, parse_config, read_json_object
from loractl.adapters.digest import CARD_FILE, CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, adapter_digest
from loractl.adapters.errors import AdapterInvalid, CheckFailed
from loractl.adapters.layout import lay_out
from loractl.adapters.manifest import Manifest, read_manifest
from loractl.adapters.tensors import read_header
from loractl.adapters.validation import config_checks, preupload, weight_checks
from loractl.adapters.validation.base_shapes import BaseShapes
from loractl.adapters.validation.record import Finding, Policy, ValidationRecord
from loractl.adapters.validation.tree import FileTree, FolderTree

_MAX_MANIFEST_BYTES = 16 << 20
_MAX_CARD_BYTES = 4 << 20
_MAX_JSON_BYTES = 32 << 20
_HASH_CHUNK_BYTES = 1 << 20


def validate_tree(
    tree: FileTree,
    *,
    policy: Policy | None = None,
    base: BaseShapes | None = None,
    expected_fingerprint: str | None = None,
) -> ValidationRecord:
    """Run all checks on a whole tree; never raises for what the files hold.

    `base`: the shapes of the base, where they are known. `expected_fingerprint`: the base that earlier versions pin.
    """
    chosen = policy or Policy()
    findings = list(_check_files(tree, chosen))
    digests: dict[str, str] = {}
    if not any(finding.level == "reject" for finding in findings):
        for folder in _adapter_folders(tree):
            found = list(_check_adapter(tree, folder, chosen, base, expected_fingerprint))
            findings += found
            complete = {_join(folder, CONFIG_FILE), _join(folder, WEIGHTS_FILE)} <= tree.sizes.keys()
            if complete and not any(finding.level == "reject" for finding in found):
                digests[folder] = _digest(tree, folder)
    not_checked = ("E_BASE_SHAPE",) if base is None and digests else ()
    return ValidationRecord(findings=tuple(findings), digests=digests, not_checked=not_checked)


def _check_files(tree: FileTree, policy: Policy) -> Iterator[Finding]:
    if isinstance(tree, FolderTree):
        for name in tree.not_regular:
            message = f"{name}: a link or special file; an adapter is plain files"
            yield Finding(code="E_PATH", level="reject", message=message, path=name)
    yield from preupload.check_sizes(tree.sizes, policy)
    yield from preupload.check_names_together(tree.sizes)
    for name in tree.sizes:
        path_findings = list(preupload.check_path(name))
        yield from path_findings
        if path_findings:
            continue
        with tree.open(name) as stream:
            sample = stream.read(preupload.SAMPLE_BYTES)
        yield from preupload.check_pickle(name, sample=sample)
        yield from preupload.check_code(name, sample=sample, tokenizer_files=policy.tokenizer_files)
        if name.endswith(".json"):
            yield from _check_json(tree, name)
        if name.endswith(".safetensors"):
            yield from _check_header(tree, name, policy)


def _check_json(tree: FileTree, name: str) -> Iterator[Finding]:
    """Every JSON file is looked through for keys that make a loader run code; ours are checked closer later."""
    if tree.sizes[name] > _MAX_JSON_BYTES:
        message = f"{name}: {tree.sizes[name]:,} bytes of JSON are over the limit of {_MAX_JSON_BYTES:,}"
        yield Finding(code="E_SIZE", level="reject", message=message, path=name)
        return
    try:
        document = json.loads(_read(tree, name))
    except (ValueError, RecursionError):
        if PurePosixPath(name).name not in {CONFIG_FILE, MANIFEST_FILE}:
            yield Finding(code="E_CODE", level="warn", message=f"{name}: not valid JSON", path=name)
        return
    if key := config_checks.find_remote_code(document):
        message = f"{name}: {key} makes a loader run code from a repository"
        yield Finding(code="E_CODE", level="reject", message=message, hint=f"remove {key}", path=name)


def _check_header(tree: FileTree, name: str, policy: Policy) -> Iterator[Finding]:
    if tree.sizes[name] < policy.min_weights_bytes:
        message = f"{name}: {tree.sizes[name]} bytes cannot hold an adapter's weights"
        hint = "weights of a sharded model must be gathered before they are saved"
        yield Finding(code="E_EMPTY", level="reject", message=message, hint=hint, path=name)
        return
    try:
        with tree.open(name) as stream:
            read_header(stream, where=name)
    except CheckFailed as error:
        yield _finding(error, path=name)


def _adapter_folders(tree: FileTree) -> list[str]:
    """Folders that hold a config or weights of an adapter; "" is the root."""
    named = {CONFIG_FILE, WEIGHTS_FILE}
    found = {str(PurePosixPath(name).parent) for name in tree.sizes if PurePosixPath(name).name in named}
    return sorted("" if folder == "." else folder for folder in found)


def _check_adapter(
    tree: FileTree, folder: str, policy: Policy, base: BaseShapes | None, expected_fingerprint: str | None
) -> Iterator[Finding]:
    config_path, weights_path = _join(folder, CONFIG_FILE), _join(folder, WEIGHTS_FILE)
    if config_path not in tree.sizes or weights_path not in tree.sizes:
        lacking = config_path if config_path not in tree.sizes else weights_path
        message = f"{lacking} is missing: nothing here can be served yet"
        yield Finding(code="E_CFG", level="warn", message=message, path=lacking)
    if config_path not in tree.sizes:
        return
    spec: LoraSpec | None = None
    try:
        spec = yield from _check_config(tree, config_path, policy)
    except CheckFailed as error:
        yield _finding(error, path=config_path)
    if spec is None:
        return
    manifest_path = _join(folder, MANIFEST_FILE)
    try:
        manifest = _manifest(tree, manifest_path)
        yield from config_checks.check_base_pin(
            spec, manifest, path=manifest_path, policy=policy, expected_fingerprint=expected_fingerprint
        )
    except AdapterInvalid as error:
        yield Finding(code="E_BASE_PIN", level="reject", message=error.message, hint=error.hint, path=manifest_path)
    yield from config_checks.check_card(_card(tree, _join(folder, CARD_FILE)), path=_join(folder, CARD_FILE))
    if weights_path in tree.sizes:
        yield from _check_weights(tree, weights_path, spec, base)


def _check_config(tree: FileTree, path: str, policy: Policy) -> Generator[Finding, None, LoraSpec | None]:
    """Yields findings; returns the spec, or None for a method other than LoRA, which is kept but not understood."""
    if tree.sizes[path] > MAX_CONFIG_BYTES:
        raise CheckFailed(f"{path}: over the limit of {MAX_CONFIG_BYTES:,} bytes", check="E_CFG")
    data = _read(tree, path)
    document = read_json_object(data, where=path)
    yield from config_checks.check_imports(document, path=path)
    method = document.get("peft_type")
    if isinstance(method, str) and method != "LORA":
        message = f"{path}: {method[:40]} adapters are stored, but neither checked nor served"
        yield Finding(code="E_CFG", level="warn", message=message, path=path)
        return None
    parsed = parse_config(data, where=path)
    if parsed.unknown_keys:
        message = f"{path}: keys that PEFT 0.21 does not know: {', '.join(parsed.unknown_keys[:8])}"
        yield Finding(code="E_CFG", level="warn", message=message, path=path)
    yield from config_checks.check_local_path(parsed.spec, path=path, policy=policy)
    yield from config_checks.check_serving(parsed.spec, path=path, policy=policy)
    return parsed.spec


def _check_weights(tree: FileTree, path: str, spec: LoraSpec, base: BaseShapes | None) -> Iterator[Finding]:
    with tree.open(path) as stream:
        try:
            tensors = read_header(stream, where=path)
            layout = lay_out(tensors.entries.values())
            found = [
                *weight_checks.check_targets(layout, spec, path=path),
                *weight_checks.check_pairs(layout, spec, path=path),
                *(weight_checks.check_base_shapes(layout, base, path=path) if base is not None else ()),
            ]
            yield from found
            if not any(finding.level == "reject" for finding in found):
                yield from weight_checks.check_values(tensors, layout, spec, path=path)
        except CheckFailed as error:
            yield _finding(error, path=path)


def _manifest(tree: FileTree, path: str) -> Manifest | None:
    if path not in tree.sizes:
        return None
    if tree.sizes[path] > _MAX_MANIFEST_BYTES:
        raise AdapterInvalid(f"{path}: over the limit of {_MAX_MANIFEST_BYTES:,} bytes")
    return read_manifest(_read(tree, path), where=path)


def _card(tree: FileTree, path: str) -> str | None:
    if path not in tree.sizes:
        return None
    with tree.open(path) as stream:
        return stream.read(_MAX_CARD_BYTES).decode("utf-8", "replace")


def _digest(tree: FileTree, folder: str) -> str:
    return adapter_digest(
        config_sha256=_sha256(tree, _join(folder, CONFIG_FILE)),
        weights_sha256=_sha256(tree, _join(folder, WEIGHTS_FILE)),
    )


def _sha256(tree: FileTree, name: str) -> str:
    if (known := tree.sha256(name)) is not None:
        return known
    digest = hashlib.sha256()
    with tree.open(name) as stream:
        while chunk := stream.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _read(tree: FileTree, name: str) -> bytes:
    with tree.open(name) as stream:
        return stream.read()


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _finding(error: CheckFailed, *, path: str) -> Finding:
    return Finding(code=error.check, level="reject", message=error.message, hint=error.hint, path=path)
