"""The rows that adapters are scored on, and the check that these adapters belong to this base. Loads no weights."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from loractl.adapters.base_identity import check_same_base, identify_base
from loractl.adapters.base_source import BaseSource
from loractl.adapters.manifest import load_manifest
from loractl.adapters.training.examples import template_columns
from loractl.adapters.training.recipe import DataPart, resolve_recipe
from loractl.adapters.training.rows import Row, read_all_rows


def evaluation_data(
    base: BaseSource,
    adapters: Sequence[tuple[str, Path]],
    files: Sequence[str],
    *,
    template: str | None,
    limit: int | None,
) -> tuple[list[Row], DataPart]:
    """Read the rows under a template, else under the one that the first adapter was trained with.

    Raises BaseMismatch where an adapter is pinned to another base.
    """
    manifests = [(name, load_manifest(folder)) for name, folder in adapters]
    identity = identify_base(base.folder, base_id=base.id) if adapters else None
    for name, manifest in manifests:
        if identity is not None:
            check_same_base(manifest.base if manifest else None, identity, adapter=name)
    if template is None:
        trained = [(manifest.recipe.get("data") or {}).get("template") for _, manifest in manifests if manifest]
        template = next((one for one in trained if one), None)
    part = resolve_recipe(preset=None, file=None, settings={"data.template": template}).data
    rows = read_all_rows(files, columns=template_columns(template))
    return rows[:limit], msgspec.structs.replace(part, files=list(files))
