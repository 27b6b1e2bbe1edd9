"""A large adapter passes through the hub piece by piece, both ways; its bytes are read in ranges and after a cut."""

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from drills import LONG
from hostile_files import CONFIG, PREFIX, WEIGHTS, entry, sound_config
from hub_nursery import nursery

pytestmark = pytest.mark.drill

# Layers with an A and a B of 2 MiB each, as a 7B base's are at a high rank.
NUM_LAYERS = 125 if LONG else 32
HALF_BYTES = 2 << 20
# What 500 MB may cost; the short form must stay under the adapter's own size.
BOUND_MIB = 150 if LONG else 100
_PIECE = 4 << 20


def _write_weights(path: Path) -> None:
    width = HALF_BYTES // 4 // 64
    tensors = {}
    for layer in range(NUM_LAYERS):
        name, start = PREFIX.replace("layers.0", f"layers.{layer}"), 2 * layer * HALF_BYTES
        tensors[f"{name}.lora_A.weight"] = entry([64, width], start, start + HALF_BYTES)
        tensors[f"{name}.lora_B.weight"] = entry([width, 64], start + HALF_BYTES, start + 2 * HALF_BYTES)
    header = json.dumps(tensors).encode()
    generator = np.random.default_rng(0)
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for _ in range(2 * NUM_LAYERS * HALF_BYTES // _PIECE):
            stream.write(generator.normal(size=_PIECE // 4).astype(np.float32).tobytes())


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            yield piece


def _mib(pid: int, field: str) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def test_large_adapter_costs_the_hub_little_memory(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    _write_weights(path)
    size = path.stat().st_size
    with path.open("rb") as stream:
        oid = hashlib.file_digest(stream, "sha256").hexdigest()
    with nursery(tmp_path / "log") as forks:
        hub = forks.serve(tmp_path / "hub")
        with httpx.Client(base_url=hub.url, headers={"authorization": f"Bearer {hub.admin}"}, timeout=300.0) as http:
            http.post("/api/repos/create", json={"name": "name", "organization": "team"}).raise_for_status()
            idle = _mib(hub.pid, "VmRSS")
            Path(f"/proc/{hub.pid}/clear_refs").write_text("5")
            wanted = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": size}]}
            offered = http.post("/team/name.git/info/lfs/objects/batch", json=wanted).json()
            href = offered["objects"][0]["actions"]["upload"]["href"]
            http.put(href, content=_pieces(path), headers={"content-length": str(size)}).raise_for_status()
            sent = _mib(hub.pid, "VmHWM")
            config = base64.b64encode(sound_config(r=64)).decode()
            lines = [
                {"key": "header", "value": {"summary": "large"}},
                {"key": "file", "value": {"path": CONFIG, "content": config}},
                {"key": "lfsFile", "value": {"path": WEIGHTS, "algo": "sha256", "oid": oid, "size": size}},
            ]
            body = "\n".join(json.dumps(line) for line in lines)
            answer = http.post("/api/models/team/name/commit/main", content=body)
            assert answer.status_code == 200, answer.text
            checked = _mib(hub.pid, "VmHWM")
            before = _mib(hub.pid, "VmRSS")
            Path(f"/proc/{hub.pid}/clear_refs").write_text("5")
            assert _download(http, cut_at=size // 3) == oid
            peak = _mib(hub.pid, "VmHWM")
    print(
        f"drill memory: adapter={size >> 20} MiB, above idle after upload={sent - idle:.0f} MiB, "
        f"checks at the commit={checked - idle:.0f} MiB, download={peak - before:.0f} MiB, bound={BOUND_MIB}"
    )
    assert sent - idle < BOUND_MIB
    assert checked - idle < BOUND_MIB
    assert peak - before < BOUND_MIB


def _download(http: httpx.Client, *, cut_at: int) -> str:
    """Read some, leave in the middle, go on from there; the hash of all."""
    digest, position = hashlib.sha256(), 0
    place = f"/team/name/resolve/main/{WEIGHTS}"
    with http.stream("GET", place) as answer:
        for piece in answer.iter_bytes(1 << 20):
            digest.update(piece)
            position += len(piece)
            if position >= cut_at:
                break
    with http.stream("GET", place, headers={"range": f"bytes={position}-"}) as answer:
        assert answer.status_code == 206
        for piece in answer.iter_bytes(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
