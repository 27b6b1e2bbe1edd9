"""Two revisions side by side: what differs in configuration, recipe, data, metrics and weights. Changes nothing."""

import asyncio
import contextlib
import math
from pathlib import Path
from typing import Any

from loractl.adapters.config import read_config
from loractl.adapters.digest import CONFIG_FILE, WEIGHTS_FILE
from loractl.adapters.tensors import open_tensors
from loractl.adapters.weight_change import AdapterWeights, LayerChange, compare_changes
from loractl.hub.blobs.store import BlobStore
from loractl.hub.registry.catalogue import Catalogue
from loractl.hub.registry.records import Repo
from loractl.hub.wire import AdapterDetail, Diff, Difference, LayerDifference

_Files = dict[str, Path]


class Comparison:
    """Compares."""

    def __init__(self, catalogue: Catalogue, store: BlobStore) -> None:
        self._catalogue = catalogue
        self._store = store
        # Each holds factors of two adapters in memory.
        self._at_once = asyncio.Semaphore(2)

    async def diff(self, first: tuple[Repo, str], second: tuple[Repo, str]) -> Diff:
        """Compare two revisions of one repo or of two. Raises RevisionNotFound, BlobMissing."""
        a, b = await self._catalogue.detail(*first), await self._catalogue.detail(*second)
        async with self._at_once:
            layers = await self._layers(a, b)
        parts = {name: _differences(_part(a, name), _part(b, name)) for name in ("recipe", "data", "metrics")}
        targets = [set((one.manifest or {}).get("targets") or _targets(one.config)) for one in (a, b)]
        squares = [math.nan if layer.difference is None else layer.difference**2 for layer in layers]
        whole = math.sqrt(sum(squares)) if layers else 0.0 if a.resolved.digest == b.resolved.digest else math.nan
        return Diff(
            a=a.resolved,
            b=b.resolved,
            config=_differences(a.config or {}, b.config or {}),
            recipe=parts["recipe"],
            data=parts["data"],
            metrics=parts["metrics"],
            targets_only_in_a=sorted(targets[0] - targets[1]),
            targets_only_in_b=sorted(targets[1] - targets[0]),
            layers=[
                LayerDifference(module=one.module, a=one.first, b=one.second, difference=one.difference)
                for one in layers
            ],
            difference=whole if math.isfinite(whole) else None,
        )

    async def _layers(self, a: AdapterDetail, b: AdapterDetail) -> list[LayerChange]:
        if a.resolved.digest is None or b.resolved.digest is None:
            return []
        async with contextlib.AsyncExitStack() as stack:
            sides: list[_Files] = []
            for one in (a, b):
                files = {file.path: file.sha256 for file in one.files}
                sides.append(
                    {
                        name: await stack.enter_async_context(self._store.local_copy(files[name]))
                        for name in (CONFIG_FILE, WEIGHTS_FILE)
                    }
                )
            return await asyncio.to_thread(_compare, *sides)


def _compare(first: _Files, second: _Files) -> list[LayerChange]:
    return compare_changes(_weights(first), _weights(second))


def _weights(files: _Files) -> AdapterWeights:
    spec = read_config(files[CONFIG_FILE].read_bytes())
    return AdapterWeights(open_tensors(files[WEIGHTS_FILE], where=WEIGHTS_FILE), spec)


def _part(detail: AdapterDetail, name: str) -> dict[str, Any]:
    part = (detail.manifest or {}).get(name)
    return part if isinstance(part, dict) else {}


def _targets(config: dict[str, Any] | None) -> list[str]:
    targets = (config or {}).get("target_modules")
    return [target for target in targets if isinstance(target, str)] if isinstance(targets, list) else []


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    left, right = _flat(a), _flat(b)
    return [
        Difference(name=name, a=left.get(name), b=right.get(name))
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    ]


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            flat |= _flat(inner, f"{prefix}{name}.")
        else:
            flat[prefix + name] = inner
    return flat
