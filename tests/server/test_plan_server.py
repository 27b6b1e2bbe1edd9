"""A plan held against a live server: another base or too high a rank is told before anything is trained."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loractl.adapters.errors import Unreachable
from loractl.adapters.training.planning import make_plan
from loractl.adapters.training.recipe import resolve_recipe
from loractl.cli.plan_server import compare_with_server
from tiny_models import make_tiny_base


async def test_server_refuses_another_base_and_too_high_a_rank_and_takes_its_own(live: Any, tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "tiny-base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"film {number}", "label": "good"}) + "\n" for number in range(8)))
    settings = {"base": str(base), "data.files": [str(rows)], "quantize": "none", "adapter.rank": 128}
    plan = make_plan(resolve_recipe(preset=None, file=None, settings=settings))
    findings = await asyncio.to_thread(compare_with_server, plan, live.url, None)
    assert {one.subject for one in findings if one.fits is False} == {"base", "rank"}
    own = replace(plan, base_fingerprint=live.serving.settings.base_fingerprint, rank=64)
    findings = await asyncio.to_thread(compare_with_server, own, live.url, None)
    assert [one.subject for one in findings if one.fits is False] == []
    said = {one.subject: one.verdict for one in findings}
    assert said["base and template"] == "ok"
    assert said["targets"] == said["dtype"] == "not shown"


async def test_server_is_asked_for_targets_and_dtype(
    live: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_tiny_base(tmp_path / "tiny-base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"film {number}", "label": "good"}) + "\n" for number in range(8)))
    settings = {"base": str(base), "data.files": [str(rows)], "dtype": "float32", "adapter.targets": ["q_proj"]}
    plan = make_plan(resolve_recipe(preset=None, file=None, settings=settings))
    shown = replace(live.serving.settings, dtype="bfloat16", targets=("k_proj", "v_proj"))
    monkeypatch.setattr(live.serving, "settings", shown)
    findings = await asyncio.to_thread(compare_with_server, plan, live.url, None)
    said = {one.subject: (one.verdict, one.fits) for one in findings}
    assert said["targets"] == ("no q_proj there", False)
    assert said["dtype"] == ("bfloat16, trained in float32: loss differs a little", None)


def test_server_that_is_not_there_is_unreachable() -> None:
    with pytest.raises(Unreachable):
        compare_with_server(None, "http://127.0.0.1:9", None)
