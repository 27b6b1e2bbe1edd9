"""The fingerprint of a base model: what must be equal for an adapter to mean the same thing.

Three hashes, then one over the three: the weight files, the tokenizer, the chat template. Reads files, loads no model.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loractl.adapters.digest import file_sha256
from loractl.adapters.errors import BaseMismatch, NotFound
from loractl.adapters.manifest import BasePin, Quantization

# Settings that change what the weights compute; the rest of config.json (versions, dtypes, paths) does not.
_SHAPE_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "layer_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
)

_UNNAMED_WINDOW = 2048


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """Who a base is. `id` is for people, the hashes decide; `shapes` are what an adapter is checked against."""

    id: str
    fingerprint: str
    weights_sha256: str
    tokenizer_sha256: str | None
    chat_template_sha256: str | None

    def pin(
        self, *, revision: str | None = None, quantization: Quantization = "none", dtype: str | None = None
    ) -> BasePin:
        """What an adapter's manifest says of this base, and of how it was held while the adapter was trained."""
        return BasePin(
            id=self.id,
            fingerprint=self.fingerprint,
            revision=revision,
            weights_sha256=self.weights_sha256,
            tokenizer_sha256=self.tokenizer_sha256,
            chat_template_sha256=self.chat_template_sha256,
            quantization=quantization,
            dtype=dtype,
        )


def check_same_base(pin: BasePin | None, base: BaseIdentity, *, adapter: object) -> None:
    """Raise BaseMismatch unless the adapter, `adapter` in the message, is pinned to this base or to none."""
    if pin is not None and pin.fingerprint != base.fingerprint:
        raise BaseMismatch(
            f"{adapter} belongs to {pin.id} ({pin.fingerprint[:19]}), not to {base.id} ({base.fingerprint[:19]})",
            hint="use the base that it was trained on",
        )


def identify_base(folder: Path, *, base_id: str | None = None) -> BaseIdentity:
    """Fingerprint a folder in transformers' format; raises NotFound when it is not one.

    Hashes of large files are remembered in the user's cache by (path, size, modification time).
    """
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise NotFound(f"{folder}: no config.json", hint="a base is a folder in transformers' format, or a hub repo id")
    config = json.loads(config_path.read_text())
    weights = _weights_sha256(folder, config)
    tokenizer = _optional_sha256(folder / "tokenizer.json") or _optional_sha256(folder / "tokenizer.model")
    template = _template_sha256(folder)
    whole = hashlib.sha256(f"loractl-base-v1\n{weights}\n{tokenizer}\n{template}\n".encode()).hexdigest()
    return BaseIdentity(
        id=base_id or folder.resolve().name,
        fingerprint=f"sha256:{whole}",
        weights_sha256=weights,
        tokenizer_sha256=tokenizer,
        chat_template_sha256=template,
    )


def base_window(config: Mapping[str, Any]) -> int:
    """Most tokens that a base was made for, by its config.json; families name it differently."""
    for key in ("max_position_embeddings", "model_max_length", "n_positions"):
        if isinstance(config.get(key), int):
            return int(config[key])
    return _UNNAMED_WINDOW


def _weights_sha256(folder: Path, config: dict[str, object]) -> str:
    shape = json.dumps({key: config.get(key) for key in _SHAPE_KEYS}, sort_keys=True)
    digest = hashlib.sha256(shape.encode())
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise NotFound(f"{folder}: no *.safetensors", hint="convert the base with transformers' save_pretrained")
    for path in files:
        digest.update(f"\n{path.name} {_remembered_sha256(path)}".encode())
    return digest.hexdigest()


def _template_sha256(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return file_sha256(path)
    config = folder / "tokenizer_config.json"
    template = json.loads(config.read_text()).get("chat_template") if config.is_file() else None
    return hashlib.sha256(json.dumps(template).encode()).hexdigest() if template else None


def _optional_sha256(path: Path) -> str | None:
    return file_sha256(path) if path.is_file() else None


def _remembered_sha256(path: Path) -> str:
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}".encode()).hexdigest()
    memo = cache_folder() / "hashes" / key
    if memo.is_file() and len(text := memo.read_text()) == 64:
        return text
    value = file_sha256(path)
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        staged = memo.with_suffix(f".{os.getpid()}")
        staged.write_text(value)
        staged.replace(memo)
    except OSError:
        pass  # a read-only home costs the next start a few seconds, nothing more
    return value


def cache_folder() -> Path:
    """Where this user's caches live: LORACTL_CACHE, else ~/.cache/loractl."""
    return Path(os.environ.get("LORACTL_CACHE") or Path.home() / ".cache" / "loractl")
