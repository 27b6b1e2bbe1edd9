"""The chart, rendered by real Helm and checked without a cluster: schemas, both halves of switches, invariants."""

import copy
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from chart_render import CHART, CI_VALUES, Manifest, containers, helm_template, of_kind, one, pod_templates, rendered
from chart_tools import HELM_3, HELM_4, HelmRelease, helm_binary

NAMES = [path.name.removesuffix("-values.yaml") for path in CI_VALUES]
CUSTOM = {"ServiceMonitor", "PrometheusRule", "ScaledObject", "HTTPRoute", "InferencePool", "TrainingRuntime"}

pytestmark = [pytest.mark.usefixtures("helm"), pytest.mark.slow]


@pytest.mark.parametrize("release", [HELM_3, HELM_4], ids=["helm3", "helm4"])
@pytest.mark.parametrize("values", NAMES)
def test_lint_is_clean_and_both_majors_render_the_same(values: str, release: HelmRelease) -> None:
    path = CHART / "ci" / f"{values}-values.yaml"
    command = [str(helm_binary(release)), "lint", "--strict", "--values", str(path), str(CHART)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(map(json.dumps, rendered(values, release=release))) == sorted(map(json.dumps, rendered(values)))


@pytest.mark.parametrize("version", ["1.28", "1.31", "1.35", "1.37"])
@pytest.mark.parametrize("values", NAMES)
def test_manifests_are_valid_when_checked_against_kubernetes(values: str, version: str) -> None:
    for manifest in rendered(values):
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(copy.deepcopy(manifest), version, strict=True)


def test_schema_check_fails_when_a_field_is_misspelt() -> None:
    manifest = copy.deepcopy(one(rendered(), "Service", "-server"))
    manifest["spec"]["ports"][0]["targetport"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, "1.35", strict=True)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("server.replica=2", "replica"),
        ("server.service.port=http", "port"),
        ("server.workload=DaemonSet", "workload"),
        ("hub.persistence.size=lots", "size"),
        ("image.cudaDigest=latest", "cudaDigest"),
    ],
)
@pytest.mark.parametrize("release", [HELM_3, HELM_4], ids=["helm3", "helm4"])
def test_values_are_refused_when_the_schema_does_not_know_them(setting: str, named: str, release: HelmRelease) -> None:
    done = helm_template("--values", str(CHART / "ci" / "default-values.yaml"), "--set", setting, release=release)
    assert done.returncode != 0
    assert named in done.stderr


@pytest.mark.parametrize(
    ("values", "setting", "named"),
    [
        ("default", "server.model.path=", "server.model.path"),
        ("default", "server.model.existingClaim=", "no base model"),
        ("default", "server.model.hostPath=/srv", "keep one"),
        ("default", "server.access.keysSecret.name=", "allowAnonymous"),
        ("default", "hub.replicas=2", "SQLite"),
        ("postgres-s3", "hub.blobs.url=", "local volume"),
        ("postgres-s3", "hub.database.urlSecret.name=", "SQLite"),
        ("postgres-s3", "networkPolicy.hubExtraEgress=null", "hubExtraEgress"),
        ("external-hub", "networkPolicy.serverExtraEgress=null", "serverExtraEgress"),
        ("keda", "server.autoscaling.minReplicas=9", "minReplicas"),
        ("gateway", "gateway.httpRoute.parentRefs=null", "parentRefs"),
        ("training-job", "training.recipe=null", "training.recipe"),
    ],
)
def test_rendering_stops_with_the_way_out_when_values_cannot_work(values: str, setting: str, named: str) -> None:
    done = helm_template("--values", str(CHART / "ci" / f"{values}-values.yaml"), "--set", setting)
    assert done.returncode != 0
    assert named in done.stderr


@pytest.mark.parametrize(
    ("values", "off", "kind", "suffix"),
    [
        ("monitoring", "monitoring.serviceMonitor.enabled=false", "ServiceMonitor", ""),
        ("monitoring", "monitoring.prometheusRule.enabled=false", "PrometheusRule", ""),
        ("default", "monitoring.dashboards.enabled=false", "ConfigMap", "-dashboard-server"),
        ("default", "networkPolicy.enabled=false", "NetworkPolicy", "-default-deny"),
        ("default", "networkPolicy.enabled=false", "NetworkPolicy", "-server"),
        ("default", "networkPolicy.enabled=false", "NetworkPolicy", "-hub"),
        ("keda", "server.autoscaling.kind=none", "ScaledObject", ""),
        ("hpa", "server.autoscaling.kind=none", "HorizontalPodAutoscaler", ""),
        ("gateway", "gateway.httpRoute.enabled=false", "HTTPRoute", "-server"),
        ("gateway", "gateway.hubRoute.enabled=false", "HTTPRoute", "-hub"),
        ("gateway", "gateway.inferencePool.enabled=false", "InferencePool", ""),
        ("gateway", "server.podDisruptionBudget.enabled=false", "PodDisruptionBudget", "-server"),
        ("gateway", "server.replicas=1", "PodDisruptionBudget", "-server"),
        ("postgres-s3", "hub.replicas=1", "PodDisruptionBudget", "-hub"),
        ("postgres-s3", "hub.migration.enabled=false", "Job", "-hub-migration"),
        ("postgres-s3", "hub.enabled=false", "Job", "-hub-migration"),
        ("default", "server.enabled=false", "Deployment", "-server"),
        ("default", "hub.enabled=false", "Deployment", "-hub"),
        ("default", "serviceAccount.create=false", "ServiceAccount", ""),
        ("default", "tests.enabled=false", "Pod", "-test-server"),
        ("training-job", "training.kind=none", "Job", ""),
        ("training-runtime", "training.kind=none", "TrainingRuntime", ""),
        ("default", "hub.persistence.existingClaim=mine", "PersistentVolumeClaim", "-hub"),
    ],
)
def test_resource_is_there_only_when_its_switch_is_on(values: str, off: str, kind: str, suffix: str) -> None:
    assert len(of_kind(rendered(values), kind, suffix)) == 1
    assert not of_kind(rendered(values, off), kind, suffix)


def test_operator_kinds_follow_the_cluster_when_left_on_auto() -> None:
    path = str(CHART / "ci" / "default-values.yaml")
    assert "kind: PrometheusRule" not in helm_template("--values", path).stdout
    known = helm_template("--values", path, "--api-versions", "monitoring.coreos.com/v1").stdout
    assert "kind: PrometheusRule" in known
    assert "kind: ServiceMonitor" in known


@pytest.mark.parametrize("values", NAMES)
def test_selectors_match_labels_and_ports_exist(values: str) -> None:
    manifests = rendered(values)
    pods = pod_templates(manifests)
    for manifest in manifests:
        if manifest["kind"] in {"Deployment", "StatefulSet"}:
            labels = manifest["spec"]["template"]["metadata"]["labels"].items()
            assert manifest["spec"]["selector"]["matchLabels"].items() <= labels
            assert "app.kubernetes.io/version" not in manifest["spec"]["selector"]["matchLabels"]
        elif manifest["kind"] == "Service":
            (pod,) = [p for p in pods if manifest["spec"]["selector"].items() <= p["metadata"]["labels"].items()]
            ports = {port["name"] for c in containers(pod) for port in c.get("ports", [])}
            assert {port["targetPort"] for port in manifest["spec"]["ports"]} <= ports
        elif manifest["kind"] == "InferencePool":
            (pod,) = [
                p
                for p in pods
                if manifest["spec"]["selector"]["matchLabels"].items() <= p["metadata"]["labels"].items()
            ]
            assert (
                manifest["spec"]["targetPorts"][0]["number"]
                == pod["spec"]["containers"][0]["ports"][0]["containerPort"]
            )
    names = [(m["kind"], m["metadata"]["name"]) for m in manifests]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("values", NAMES)
def test_pods_meet_the_restricted_standard_and_bound_what_they_write(values: str) -> None:
    for pod in pod_templates(rendered(values)):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] >= 10_000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        mounts = {volume["name"] for volume in spec.get("volumes", [])} | {"adapter-cache"}
        for container in containers(pod):
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= mounts
            if not container["image"].startswith("loractl/"):
                continue  # a user's own init container
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            assert re.search(r"(:[^:]*[0-9][^:]*|@sha256:[0-9a-f]{64})$", container["image"])
        for volume in spec.get("volumes", []):
            if "emptyDir" in volume and volume["name"] != "more":
                assert volume["emptyDir"]["sizeLimit"]


@pytest.mark.parametrize("values", [name for name in NAMES if name != "training-job"])
def test_grace_period_covers_the_drain(values: str) -> None:
    for pod in pod_templates(rendered(values)):
        for container in pod["spec"]["containers"]:
            if "lifecycle" in container:
                sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
                flags = [a for a in container["args"] if a.startswith("--drain-timeout=")]
                drain = int(flags[0].partition("=")[2]) if flags else 0
                assert pod["spec"]["terminationGracePeriodSeconds"] >= sleep + drain + 15


def test_cache_volume_is_larger_than_the_limit_that_the_server_keeps() -> None:
    pod = one(rendered(), "Deployment", "-server")["spec"]["template"]["spec"]
    limit = next(int(a.partition("=")[2]) for a in pod["containers"][0]["args"] if a.startswith("--cache-bytes="))
    volume = next(v for v in pod["volumes"] if v["name"] == "adapter-cache")
    assert limit == 20 << 30
    assert int(volume["emptyDir"]["sizeLimit"]) == limit + limit // 10


def test_vllms_names_and_traces_are_there_only_when_asked_for() -> None:
    def server(*settings: str) -> tuple[list[str], dict[str, str], list[Manifest]]:
        manifests = rendered("monitoring", *settings)
        container = one(manifests, "Deployment", "-server")["spec"]["template"]["spec"]["containers"][0]
        environment = {entry["name"]: entry.get("value", "") for entry in container["env"]}
        egress: list[Manifest] = one(manifests, "NetworkPolicy", "-server")["spec"]["egress"]
        return container["args"], environment, egress

    arguments, environment, egress = server()
    assert "--vllm-metrics" in arguments
    assert environment["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://collector.monitoring.svc:4318"
    assert (environment["OTEL_SERVICE_NAME"], environment["OTEL_TRACES_SAMPLER_ARG"]) == ("demo-loractl-server", "0.1")
    assert {"ports": [{"port": 4318}]} in egress
    arguments, environment, egress = server("server.metrics.vllmNames=false", "server.tracing.endpoint=")
    assert "--vllm-metrics" not in arguments
    assert not [name for name in environment if name.startswith("OTEL_")]
    assert {"ports": [{"port": 4318}]} not in egress
    assert {"ports": [{"port": 4318}]} not in server("server.tracing.egressPort=0")[2]


def test_gpu_is_asked_for_in_both_requests_and_limits_when_there_is_one() -> None:
    def first(*settings: str) -> Manifest:
        pod: Manifest = one(rendered("default", *settings), "Deployment", "-server")["spec"]["template"]["spec"]
        container: Manifest = pod["containers"][0]
        return container

    with_gpu, without = first("server.gpu.count=2"), first("server.gpu.count=0")
    assert with_gpu["resources"]["requests"]["nvidia.com/gpu"] == with_gpu["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert with_gpu["image"].endswith("-cuda")
    assert "nvidia.com/gpu" not in json.dumps(without["resources"])
    assert without["image"].endswith("-cpu")


def test_hub_has_one_writer_when_it_keeps_state_on_its_volume() -> None:
    local, remote = one(rendered(), "Deployment", "-hub"), one(rendered("postgres-s3"), "Deployment", "-hub")
    assert (local["spec"]["replicas"], local["spec"]["strategy"]) == (1, {"type": "Recreate"})
    assert remote["spec"]["strategy"]["type"] == "RollingUpdate"
    assert not of_kind(rendered("postgres-s3"), "PersistentVolumeClaim")


def test_secrets_are_files_but_for_the_keys_that_aws_libraries_read() -> None:
    for values in NAMES:
        for pod in pod_templates(rendered(values)):
            for container in containers(pod):
                from_secrets = {e["name"] for e in container.get("env", []) if "secretKeyRef" in e.get("valueFrom", {})}
                assert from_secrets <= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "KEYS"}, values
                mounts = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
                named = [e["value"] for e in container.get("env", []) if e["name"].endswith("_FILE")]
                named += [a.partition("=")[2] for a in map(str, container.get("args", [])) if "-file=" in a]
                assert all(path.rpartition("/")[0] in mounts for path in named), values


def test_migration_stops_an_upgrade_before_pods_are_replaced_and_sqlite_has_none() -> None:
    job = one(rendered("postgres-s3"), "Job", "-hub-migration")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-upgrade"
    assert job["spec"]["template"]["spec"]["containers"][0]["args"] == ["hub", "migrate"]
    assert not of_kind(rendered(), "Job", "-hub-migration")


@pytest.mark.parametrize("values", NAMES)
def test_network_policies_deny_all_pods_and_name_the_ports(values: str) -> None:
    policies = of_kind(rendered(values), "NetworkPolicy")
    if values == "cpu":
        assert not policies
        return
    deny = one(rendered(values), "NetworkPolicy", "-default-deny")["spec"]
    assert deny["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in deny
    assert "egress" not in deny
    for pod in pod_templates(rendered(values)):
        assert deny["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    for policy in policies:
        for rule in policy["spec"].get("ingress", []):
            assert "ports" in rule or policy["metadata"]["name"].endswith("-training")


def test_rule_overrides_and_switches_reach_the_alerts() -> None:
    groups = one(rendered("monitoring"), "PrometheusRule")["spec"]["groups"]
    alerts = {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}
    assert "LoractlITLHigh" not in alerts
    assert alerts["LoractlHubDown"]["for"] == "10m"
    assert all(rule["labels"]["team"] == "ml" for rule in alerts.values())
    assert alerts["LoractlEngineDown"]["annotations"]["runbook_url"].endswith("RUNBOOK.md#loractlenginedown")


def test_every_key_of_the_values_is_explained_and_closed_by_the_schema() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    for i, line in enumerate(lines):
        if re.match(r"\s*[a-zA-Z]+:\s+\S", line) and line.strip().split(":")[0] not in _kubernetes_keys():
            assert "#" in lines[i - 1], f"values.yaml:{i + 1}: {line.strip()} has no comment above it"
    schema = json.loads((CHART / "values.schema.json").read_text())
    _check_closed(schema, yaml.safe_load((CHART / "values.yaml").read_text()), "")


def _kubernetes_keys() -> set[str]:
    """Keys inside defaults that Kubernetes defines, which need no comment of ours."""
    text = (CHART / "values.yaml").read_text()
    defaults = yaml.safe_load(text)
    keys: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                keys.add(key)
                collect(inner)

    for part in ("server", "hub", "training"):
        for name in ("podSecurityContext", "securityContext", "resources"):
            collect(defaults[part].get(name, {}))
    collect(defaults["networkPolicy"]["monitoringNamespaceLabels"])
    return keys | set(defaults["monitoring"]["dashboards"]["labels"])


def _check_closed(schema: dict[str, Any], values: object, where: str) -> None:
    if schema.get("type") == "object" and "properties" in schema:
        assert schema["additionalProperties"] is False, where
        assert isinstance(values, dict)
        assert set(values) | ({"global"} if not where else set()) == set(schema["properties"]), where
        for key, inner in values.items():
            _check_closed(schema["properties"][key], inner, f"{where}.{key}")


def test_chart_packages_without_what_it_does_not_need(tmp_path: Path) -> None:
    command = [str(helm_binary(HELM_4)), "package", str(CHART), "--destination", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert [path.name for path in tmp_path.iterdir()] == ["loractl-0.1.0.tgz"]
