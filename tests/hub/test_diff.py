"""Two revisions compared by a live hub, their weights against what PEFT makes of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from live_hub import LiveHub
from loractl.adapters.manifest import DataRecord, Manifest, save_manifest
from loractl.adapters.reference import parse_reference
from loractl.hub.client import HubClient
from pushing import push
from tiny_models import make_adapter


def _peft_changes(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter)
    )
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").double()
        for name, layer in layers.items()
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4},
        {"r": 8, "lora_alpha": 3},
        {"r": 4, "use_rslora": True},
        {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
        {"target_modules": ["q_proj", "o_proj"]},
    ],
    ids="-".join,
)
def test_change_of_each_layer_is_what_peft_makes_of_it(
    folder_hub: LiveHub, tiny_base: Path, adapter: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    second = make_adapter(tiny_base, tmp_path / "second", seed=7, **settings)
    push(folder_hub, adapter)
    push(folder_hub, second, "team/other")
    with HubClient(folder_hub.url, folder_hub.admin) as client:
        found = client.diff(parse_reference("team/name@v1"), parse_reference("team/other"))
    ours = {layer.module: layer for layer in found.layers}
    a, b = _peft_changes(tiny_base, adapter), _peft_changes(tiny_base, second)
    assert ours.keys() == a.keys() | b.keys()
    total = 0.0
    for name, layer in ours.items():
        zero = torch.zeros_like(a.get(name, b.get(name)))  # type: ignore[arg-type]
        difference = float((b.get(name, zero) - a.get(name, zero)).norm())
        assert layer.difference == pytest.approx(difference, rel=1e-4)
        assert layer.a == (pytest.approx(float(a[name].norm()), rel=1e-4) if name in a else None)
        assert layer.b == (pytest.approx(float(b[name].norm()), rel=1e-4) if name in b else None)
        total += difference**2
    assert total > 0
    assert found.difference == pytest.approx(total**0.5, rel=1e-4)


def test_same_adapter_differs_by_nothing(folder_hub: LiveHub, adapter: Path) -> None:
    push(folder_hub, adapter)
    with HubClient(folder_hub.url, folder_hub.admin) as client:
        found = client.diff(parse_reference("team/name@v1"), parse_reference("team/name"))
    assert found.difference == pytest.approx(0.0, abs=1e-5)
    assert found.config == found.recipe == found.data == found.metrics == []


def test_recipe_data_metrics_and_targets_are_compared(folder_hub: LiveHub, tiny_base: Path, tmp_path: Path) -> None:
    for number, target in ((1, "q_proj"), (2, "v_proj")):
        folder = make_adapter(tiny_base, tmp_path / str(number), seed=number, target_modules=[target])
        manifest = Manifest(
            targets=[target],
            recipe={"train": {"lr": number / 10, "epochs": 3}},
            data=DataRecord(digest="sha256:" + str(number) * 64, num_rows=10),
            metrics={"eval_loss": float(number), "same": 1.0},
        )
        save_manifest(manifest, folder)
        push(folder_hub, folder)
    with HubClient(folder_hub.url, folder_hub.admin) as client:
        found = client.diff(parse_reference("team/name@v1"), parse_reference("team/name@v2"))
    assert [(one.name, one.a, one.b) for one in found.recipe] == [("train.lr", 0.1, 0.2)]
    assert [one.name for one in found.data] == ["digest"]
    assert [(one.name, one.a, one.b) for one in found.metrics] == [("eval_loss", 1.0, 2.0)]
    assert [one.name for one in found.config] == ["target_modules"]
    assert (found.targets_only_in_a, found.targets_only_in_b) == (["q_proj"], ["v_proj"])


def test_private_repo_cannot_be_compared_with_by_others(folder_hub: LiveHub, adapter: Path) -> None:
    push(folder_hub, adapter)
    folder_hub.api().create_repo("lab/secret", private=True)
    with folder_hub.http(folder_hub.token("read", pattern="team/*")) as http:
        hidden = http.get("/api/loractl/v1/diff", params={"a": "team/name", "b": "lab/secret"})
        missing = http.get("/api/loractl/v1/diff", params={"a": "team/name", "b": "lab/absent"})
        wrong = http.get("/api/loractl/v1/diff", params={"a": "team/name", "b": "../x"})
    assert hidden.status_code == missing.status_code == 404
    assert hidden.json()["error"].replace("secret", "absent") == missing.json()["error"]
    assert wrong.status_code == 400


def test_versions_trained_from_another_name_their_parent_and_list_narrows_by_author(
    folder_hub: LiveHub, adapter: Path, tiny_base: Path, tmp_path: Path
) -> None:
    push(folder_hub, adapter, token=folder_hub.token("write", name="ada"))
    with folder_hub.http() as http:
        digest = http.get("/api/loractl/v1/resolve", params={"repo": "team/name"}).json()["digest"]
        child = make_adapter(tiny_base, tmp_path / "child", seed=9)
        save_manifest(Manifest(parent=digest), child)
        by_ada = http.get("/api/loractl/v1/adapters", params={"author": "ada"}).json()["adapters"]
        push(folder_hub, child)
        detail = http.get("/api/loractl/v1/adapters/team/name").json()
        later = http.get("/api/loractl/v1/adapters", params={"author": "ada"}).json()["adapters"]
    assert ([one["repo_id"] for one in by_ada], later) == (["team/name"], [])
    assert (detail["parent"], json.dumps(detail["manifest"]["parent"])) == ("v1", json.dumps(digest))
