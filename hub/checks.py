"""The one place where the hub asks for a verdict on a tree of files. Knows blobs and `loractl.adapters`, no request."""

import asyncio
import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from loractl.adapters.digest import CARD_FILE, CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from loractl.adapters.errors import AdapterInvalid, BlobCorrupt
from loractl.adapters.manifest import Manifest, read_manifest
from loractl.adapters.validation import Policy, ValidationRecord, validate_tree
from loractl.hub.blobs.store import BlobStore
from loractl.hub.registry.records import TreeEntry

_MAX_CARD_BYTES = 1 << 20
_MAX_TAGS = 50


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What an adapter says of itself, for lists and searches."""

    digest: str | None = None
    adapter_size_bytes: int = 0
    base_id: str | None = None
    base_fingerprint: str | None = None
    task: str | None = None
    rank: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    tags: tuple[str, ...] = ()


class _BlobTree:
    """The files of a commit as the checks read them: names over the paths of blobs."""

    def __init__(self, entries: Iterable[TreeEntry], paths: dict[str, Path]) -> None:
        self._paths = paths
        self._sha256 = {entry.path: entry.sha256 for entry in entries}
        self.sizes: dict[str, int] = {entry.path: entry.size_bytes for entry in entries}

    def open(self, name: str) -> BinaryIO:
        return self._paths[name].open("rb")

    def sha256(self, name: str) -> str | None:
        return self._sha256[name]


async def check_commit(
    store: BlobStore, entries: list[TreeEntry], *, policy: Policy, expected_fingerprint: str | None
) -> tuple[ValidationRecord, AdapterFacts]:
    """Run every check on a tree and collect its facts; reads each file once or twice, in a thread."""
    async with contextlib.AsyncExitStack() as stack:
        paths: dict[str, Path] = {}
        for entry in entries:
            path = paths[entry.path] = await stack.enter_async_context(store.local_copy(entry.sha256))
            if path.stat().st_size != entry.size_bytes:
                raise BlobCorrupt(f"blob {entry.sha256} has another size than was pushed", hint="push the file again")
        tree = _BlobTree(entries, paths)
        record = await asyncio.to_thread(validate_tree, tree, policy=policy, expected_fingerprint=expected_fingerprint)
        return record, await asyncio.to_thread(_read_facts, tree, record)


def _read_facts(tree: _BlobTree, record: ValidationRecord) -> AdapterFacts:
    config = read_json(_read(tree, CONFIG_FILE)) or {}
    manifest = _read_manifest(tree)
    card = front_matter(_read(tree, CARD_FILE)[:_MAX_CARD_BYTES])
    base = manifest.base if manifest is not None else None
    base_id = base.id if base is not None else _text(config.get("base_model_name_or_path"))
    rank = config.get("r")
    return AdapterFacts(
        digest=record.digests.get(""),
        adapter_size_bytes=tree.sizes.get(CONFIG_FILE, 0) + tree.sizes.get(WEIGHTS_FILE, 0),
        base_id=base_id,
        base_fingerprint=base.fingerprint if base is not None else None,
        task=(manifest.task if manifest is not None else None) or _text(config.get("task_type")),
        rank=rank if isinstance(rank, int) and not isinstance(rank, bool) else None,
        metrics=manifest.metrics if manifest is not None else {},
        tags=_tags(card, base_id=base_id, is_lora=config.get("peft_type") == "LORA"),
    )


def _read(tree: _BlobTree, name: str) -> bytes:
    if name not in tree.sizes:
        return b""
    with tree.open(name) as stream:
        return stream.read()


def _read_manifest(tree: _BlobTree) -> Manifest | None:
    if MANIFEST_FILE not in tree.sizes:
        return None
    try:
        return read_manifest(_read(tree, MANIFEST_FILE))
    except AdapterInvalid:
        # The record of the checks names it.
        return None


def read_json(data: bytes) -> dict[str, Any] | None:
    """An object, or None for everything else."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def front_matter(card: bytes) -> dict[str, Any]:
    """The YAML between the first two `---` lines of a card; empty where there is none or it is broken."""
    lines = card.decode("utf-8", "replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    ends = [number for number, line in enumerate(lines[1:], start=1) if line.strip() == "---"]
    if not ends:
        return {}
    try:
        document = yaml.safe_load("\n".join(lines[1 : ends[0]]))
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _tags(card: dict[str, Any], *, base_id: str | None, is_lora: bool) -> tuple[str, ...]:
    """The words that Hugging Face clients filter by."""
    tags = ["peft", *(["lora"] if is_lora else [])]
    if base_id is not None:
        tags += [f"base_model:{base_id}", f"base_model:adapter:{base_id}"]
    tags += _texts(card.get("tags"))
    tags += [f"license:{name}" for name in _texts(card.get("license"))]
    tags += [f"dataset:{name}" for name in _texts(card.get("datasets"))]
    return tuple(dict.fromkeys(tags))[:_MAX_TAGS]


def _texts(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for item in values if (text := _text(item)) is not None]


def _text(value: object) -> str | None:
    return value[:200] if isinstance(value, str) and value else None
