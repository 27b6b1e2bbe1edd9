"""Adapters that no other check has, and the type of a hub of one's own. Knows no client and no wire."""

import contextlib
import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hostile_files import sound_config, weights
from hub_process import HubProcess

OpenHub = Callable[..., "contextlib.AbstractContextManager[HubProcess]"]


def write_adapter(folder: Path, *, seed: int = 0, size: int = 4096) -> Path:
    """An adapter whose weights are about 32 x `size` bytes and that no other check has."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng([seed, int.from_bytes(secrets.token_bytes(4), "little")])
    data = weights(generator.normal(size=(4, size)), generator.normal(size=(size, 4)))
    (folder / "adapter_model.safetensors").write_bytes(data)
    (folder / "adapter_config.json").write_bytes(sound_config())
    (folder / "README.md").write_text(f"---\nbase_model: org/base\nlicense: mit\ntags: [lora]\n---\n# {seed}\n")
    return folder
