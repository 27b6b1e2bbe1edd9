"""Renders charts/loractl with real Helm and finds things in the result. Knows no cluster."""

import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from chart_tools import HELM_4, HelmRelease, helm_binary

CHART = Path(__file__).parents[2] / "charts" / "loractl"
CI_VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
Manifest = dict[str, Any]


def helm_template(*arguments: str, release: HelmRelease = HELM_4) -> subprocess.CompletedProcess[str]:
    """Run `helm template`; the caller looks at the exit code."""
    command = [str(helm_binary(release)), "template", "demo", str(CHART), "--namespace", "ml", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@cache
def rendered(values: str = "default", *settings: str, release: HelmRelease = HELM_4) -> tuple[Manifest, ...]:
    """The manifests of one ci values file, with `a.b=c` settings on top."""
    extra = [part for setting in settings for part in ("--set", setting)]
    done = helm_template("--values", str(CHART / "ci" / f"{values}-values.yaml"), *extra, release=release)
    assert done.returncode == 0, done.stderr
    return tuple(document for document in yaml.safe_load_all(done.stdout) if document)


def of_kind(manifests: tuple[Manifest, ...], kind: str, suffix: str = "") -> list[Manifest]:
    return [m for m in manifests if m["kind"] == kind and m["metadata"]["name"].endswith(suffix)]


def one(manifests: tuple[Manifest, ...], kind: str, suffix: str = "") -> Manifest:
    (found,) = of_kind(manifests, kind, suffix)
    return found


def pod_templates(manifests: tuple[Manifest, ...]) -> list[Manifest]:
    """Every pod that the manifests would start, as {metadata, spec}."""
    found = [m["spec"]["template"] for m in manifests if m["kind"] in {"Deployment", "StatefulSet", "Job"}]
    found += [m["spec"]["jobTemplate"]["spec"]["template"] for m in manifests if m["kind"] == "CronJob"]
    for runtime in of_kind(manifests, "TrainingRuntime"):
        found += [job["template"]["spec"]["template"] for job in runtime["spec"]["template"]["spec"]["replicatedJobs"]]
    return found + of_kind(manifests, "Pod")


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
