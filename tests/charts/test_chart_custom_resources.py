"""Custom resources against the types of their definitions, by the TypeScript compiler: unknown fields are errors."""

import json
import subprocess
from pathlib import Path

import pytest

from chart_render import Manifest, one, rendered
from chart_tools import ToolMissing, crd_types, program

MODULES = {
    "ServiceMonitor": "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/ServiceMonitor",
    "PrometheusRule": "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PrometheusRule",
    "ScaledObject": "@kubernetes-models/keda/keda.sh/v1alpha1/ScaledObject",
    "HTTPRoute": "@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1/HTTPRoute",
}

pytestmark = [pytest.mark.usefixtures("helm"), pytest.mark.slow]


@pytest.fixture(scope="module")
def types() -> Path:
    try:
        program("node", "nodejs")
        return crd_types()
    except ToolMissing as missing:
        pytest.skip(str(missing))


def compile_as_types(types: Path, folder: Path, manifests: list[Manifest]) -> subprocess.CompletedProcess[str]:
    """Type-check manifests as literals of their definitions."""
    (folder / "node_modules").symlink_to(types / "node_modules")
    lines = [f'import {{ I{kind} }} from "{module}";' for kind, module in MODULES.items()]
    for i, manifest in enumerate(manifests):
        lines.append(f"export const m{i}: I{manifest['kind']} = {json.dumps(manifest)};")
    (folder / "manifests.ts").write_text("\n".join(lines))
    tsc = types / "node_modules" / ".bin" / "tsc"
    options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext", "--target", "es2022"]
    command = [str(tsc), *options, "manifests.ts"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_custom_resources_have_only_fields_that_their_definitions_know(types: Path, tmp_path: Path) -> None:
    manifests = [
        one(rendered("monitoring"), "ServiceMonitor"),
        one(rendered("monitoring"), "PrometheusRule"),
        one(rendered("keda"), "ScaledObject"),
        one(rendered("gateway"), "HTTPRoute", "-server"),
        one(rendered("gateway"), "HTTPRoute", "-hub"),
    ]
    done = compile_as_types(types, tmp_path, manifests)
    assert done.returncode == 0, done.stdout


def test_a_field_that_the_definition_does_not_know_is_found(types: Path, tmp_path: Path) -> None:
    monitor = one(rendered("monitoring"), "ServiceMonitor")
    wrong = {**monitor, "spec": {**monitor["spec"], "sampleLimits": 1}}
    done = compile_as_types(types, tmp_path, [wrong])
    assert done.returncode != 0
    assert "sampleLimits" in done.stdout


def test_inference_pool_has_the_fields_of_its_first_stable_version() -> None:
    pool = one(rendered("gateway"), "InferencePool")
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    assert set(pool["spec"]) == {"selector", "targetPorts", "endpointPickerRef"}
    assert set(pool["spec"]["selector"]) == {"matchLabels"}
    assert set(pool["spec"]["endpointPickerRef"]) == {"name", "port", "failureMode"}
