"""`loractl.json`: what ties an adapter to its base, its data, its recipe and its proof of effect.

PEFT ignores the file; the hub shows it, the server checks it, `loractl diff` compares it.
"""

from pathlib import Path
from typing import Any, Literal

import msgspec

from loractl.adapters.digest import MANIFEST_FILE
from loractl.adapters.errors import AdapterInvalid

SCHEMA_VERSION = 1

Quantization = Literal["int8", "nf4", "none"]


class BasePin(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Which base an adapter belongs to; `fingerprint` decides, the names are for people."""

    id: str
    """A hub repo id, or the folder's name for a base that came from a folder; never a path."""
    fingerprint: str
    """`sha256:<hex>` of weights, tokenizer and chat template together (`loractl.adapters.base_identity`)."""
    revision: str | None = None
    """The commit of `id` in its hub, 40 hex digits, where it has one."""
    weights_sha256: str | None = None
    tokenizer_sha256: str | None = None
    chat_template_sha256: str | None = None
    quantization: Quantization = "none"
    """What the base was held in while the adapter was trained."""
    dtype: str | None = None


class DataRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What an adapter was trained on, told without the rows themselves."""

    digest: str
    """`sha256:<hex>` over the sorted digests of the rows: the order of the file does not matter."""
    num_rows: int
    num_eval_rows: int = 0
    num_supervised_tokens: int = 0
    files: list[str] = []
    """File names, without folders."""


class Probe(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A prompt and what adapter and base said next; a server recomputes it when it loads the adapter."""

    prompt_ids: list[int]
    continuation_ids: list[int]
    adapter_logprobs: list[float]
    """Log probability of each token of the continuation, with the adapter."""
    base_logprobs: list[float]
    """The same without it; an adapter that changes nothing has equal lists."""


class Manifest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The whole record; every part beyond `base` may be absent in adapters made elsewhere."""

    schema_version: int = SCHEMA_VERSION
    base: BasePin | None = None
    name: str | None = None
    task: str | None = None
    rank: int | None = None
    targets: list[str] = []
    num_trainable_parameters: int | None = None
    data: DataRecord | None = None
    recipe: dict[str, Any] = {}
    """Every resolved setting of the run, as `recipe.lock.yaml` holds them."""
    metrics: dict[str, float] = {}
    """Final figures, such as `eval_loss`, `train_loss`, `train_seconds`, `eval_accuracy`."""
    measured_on: dict[str, str] = {}
    """For each metric of held-out rows, the digest of those rows: figures over other rows are not compared."""
    loss_curve: list[tuple[int, float]] = []
    """(step, training loss)."""
    probes: list[Probe] = []
    parent: str | None = None
    """Digest of the adapter that training started from."""
    loractl_version: str | None = None
    created_at: str | None = None
    """RFC 3339, UTC."""


def read_manifest(data: bytes, *, where: str = MANIFEST_FILE) -> Manifest:
    """Decode a manifest; raises AdapterInvalid naming the field that is wrong."""
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise AdapterInvalid(f"{where}: {error}") from error
    if manifest.schema_version > SCHEMA_VERSION:
        raise AdapterInvalid(
            f"{where}: schema_version {manifest.schema_version} is newer than {SCHEMA_VERSION}",
            hint="update loractl to read this adapter's manifest",
        )
    return manifest


def load_manifest(folder: Path) -> Manifest | None:
    """Read an adapter folder's manifest; None where there is none, as in adapters made by other tools."""
    path = folder / MANIFEST_FILE
    return read_manifest(path.read_bytes(), where=str(path)) if path.is_file() else None


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Write the manifest into an adapter folder, stable enough to be compared as text."""
    encoded = msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=2)
    (folder / MANIFEST_FILE).write_bytes(encoded + b"\n")
