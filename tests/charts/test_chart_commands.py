"""What the rendered manifests run exists: flags, environment, routes and metrics of the real commands."""

import json
import re
from pathlib import Path

import click
import pytest
import yaml

from chart_render import CI_VALUES, containers, one, pod_templates, rendered
from loractl.cli.main import COMMANDS, group, run
from loractl.hub.settings import ENV_PREFIX, HubSettings

ROOT = Path(__file__).parents[2]
NAMES = [path.name.removesuffix("-values.yaml") for path in CI_VALUES]

pytestmark = [pytest.mark.usefixtures("helm"), pytest.mark.slow]


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """The click command that `words` name, and the rest of them."""
    context = click.Context(group, **group.context_settings)
    command: click.Command = group
    for i, word in enumerate(words):
        if not isinstance(command, click.Group):
            return command, words[i:]
        found = command.get_command(context, word)
        assert found is not None, f"no command {word!r}"
        command = found
    return command, []


@pytest.mark.parametrize("values", NAMES)
def test_arguments_are_parsed_by_the_real_command(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0
    for pod in pod_templates(rendered(values)):
        for container in containers(pod):
            if container.get("command") in (["loractl"], ["torchrun", "-m", "loractl.cli"]):
                command, rest = command_of([str(word) for word in container["args"]])
                for option in command.params:  # folders of the container are not on this machine
                    if isinstance(option.type, click.Path):
                        monkeypatch.setattr(option.type, "exists", False)
                command.make_context(container["name"], rest)
                seen += 1
    assert seen


def test_a_flag_that_does_not_exist_is_found() -> None:
    command, rest = command_of(["serve", "base", "--no-such-flag=1"])
    with pytest.raises(click.NoSuchOption):
        command.make_context("serve", rest)


@pytest.mark.parametrize("values", NAMES)
def test_environment_of_the_hub_is_known_to_its_settings(values: str) -> None:
    fields = {ENV_PREFIX + name.upper() + end for name in HubSettings.__dataclass_fields__ for end in ("", "_FILE")}
    for pod in pod_templates(rendered(values)):
        for container in containers(pod):
            names = {entry["name"] for entry in container.get("env", [])}
            assert {name for name in names if name.startswith(ENV_PREFIX)} <= fields


@pytest.mark.parametrize(("part", "folder"), [("server", "server"), ("hub", "hub")])
def test_probes_ask_routes_that_the_application_has(part: str, folder: str) -> None:
    sources = "".join(path.read_text() for path in (ROOT / folder).rglob("*.py"))
    container = one(rendered(), "Deployment", f"-{part}")["spec"]["template"]["spec"]["containers"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert f'"{container[probe]["httpGet"]["path"]}"' in sources
    monitor = one(rendered("monitoring"), "ServiceMonitor")["spec"]
    assert all(f'"{endpoint["path"]}"' in sources for endpoint in monitor["endpoints"])


def test_picker_polls_a_page_and_metrics_that_the_server_has() -> None:
    config = yaml.safe_load(one(rendered("gateway"), "ConfigMap", "-picker")["data"]["config.yaml"])
    plugins = {plugin["type"]: plugin.get("parameters", {}) for plugin in config["plugins"]}
    sources = (ROOT / "server" / "operator_routes.py").read_text()
    assert f'"{plugins["metrics-data-source"]["path"]}"' in sources
    metrics = (ROOT / "server" / "engine_metrics.py").read_text()
    (engine,) = plugins["core-metrics-extractor"]["engineConfigs"]
    for key, value in engine.items():
        if key.endswith("Spec"):
            assert value.removeprefix("loractl_server_") in metrics


@pytest.mark.parametrize("values", ["default", "monitoring"])
def test_serve_takes_the_rendered_flags_with_check_config(
    values: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_models import make_tiny_base

    path = "q" if values == "monitoring" else "smollm2"
    base = make_tiny_base(tmp_path / path)
    keys = tmp_path / "keys"
    keys.write_text("sk-chart-test-0123456789abcdef\n")
    container = one(rendered(values), "Deployment", "-server")["spec"]["template"]["spec"]["containers"][0]
    for entry in container["env"]:
        if entry["name"].startswith("OTEL_"):
            monkeypatch.setenv(entry["name"], entry["value"])
    places = {
        f"/models/{path}": str(base),
        "/run/secrets/loractl/keys": str(keys),
        "/var/cache/loractl": str(tmp_path / "cache"),
    }
    words = [str(word) for word in container["args"]]
    for inside, here in places.items():
        words = [re.sub(rf"(^|=){inside}", rf"\g<1>{here}", word) for word in words]
    code = run([*words, "--check-config"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    told = json.loads(shown.out)
    assert (told["vllm_metrics"], told["tracing"]) == ((True, True) if path == "q" else (False, False))


def test_hub_takes_the_rendered_flags_and_files_with_check_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "database-url"
    secret.write_text("postgresql://hub:secret@db/hub\n")
    container = one(rendered("postgres-s3"), "Deployment", "-hub")["spec"]["template"]["spec"]["containers"][0]
    for entry in container["env"]:
        if entry["name"].startswith(ENV_PREFIX):
            monkeypatch.setenv(entry["name"], entry["value"].replace("/run/secrets/loractl", str(tmp_path)))
    assert run([*map(str, container["args"]), "--check-config"]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown) == {"root": "/var/lib/loractl", "database": "PostgreSQL", "blobs": "s3://adapters/prod"}
    assert "secret" not in shown


def test_every_command_of_the_chart_is_one_of_the_program() -> None:
    used = {
        container["args"][0]
        for values in NAMES
        for pod in pod_templates(rendered(values))
        for container in containers(pod)
        if container.get("command") == ["loractl"]
    }
    assert used == {"serve", "hub", "train", "push"}
    assert used <= set(COMMANDS)
