"""The digest of an adapter: one hash over its config and its weights, and over nothing else."""

import hashlib
from pathlib import Path

from loractl.adapters.errors import AdapterInvalid
from loractl.adapters.reference import Digest

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "loractl.json"
CARD_FILE = "README.md"

_CHUNK_BYTES = 1 << 20


def adapter_digest(*, config_sha256: str, weights_sha256: str) -> Digest:
    """Combine the two files' sha256 (hex); a hub knows both without reading the files again."""
    text = f"loractl-adapter-v1\n{config_sha256}\n{weights_sha256}\n"
    return Digest("sha256:" + hashlib.sha256(text.encode()).hexdigest())


def folder_digest(folder: Path) -> Digest:
    """Hash an adapter folder; raises AdapterInvalid when one of its two files is absent."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise AdapterInvalid(f"{folder}: no {name}", hint="an adapter folder is what `loractl train` or PEFT saves")
    return adapter_digest(
        config_sha256=file_sha256(folder / CONFIG_FILE), weights_sha256=file_sha256(folder / WEIGHTS_FILE)
    )


def file_sha256(path: Path) -> str:
    """Hash a file in bounded memory, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
