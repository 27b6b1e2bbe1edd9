"""The Dockerfiles, read and not built: they hold what the code needs, and what the chart expects of them."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "charts").glob("Dockerfile.*"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _instructions(path: Path) -> list[str]:
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE)
    return re.sub(r"\\\n\s*", "", text).splitlines()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.suffix)
def test_images_hold_what_the_code_needs(path: Path) -> None:
    lines = _instructions(path)
    text = "\n".join(lines)
    copied = {word.rstrip("/") for line in lines if re.match(r"COPY (?!--from)", line) for word in line.split()[1:-1]}
    packages = {folder.split("/")[0] for folder in PROJECT["tool"]["setuptools"]["package-dir"].values()}
    assert packages - {""} <= copied
    assert {PROJECT["project"]["readme"], "pyproject.toml"} <= copied
    (extras,) = re.findall(r"\.whl\)\[([a-z0-9,]+)\]", text)
    # What values of the chart lead to: PostgreSQL, S3, traces.
    assert {"postgres", "s3", "otel"} == set(extras.split(","))
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])
    final = text.rpartition("\nFROM ")[2]
    compiler = {".cpu": "g++", ".cuda": "gcc"}[path.suffix]
    assert re.search(rf"apt-get install .*{re.escape(compiler)}", final), "kernels are compiled on the first start"
    (entry,) = re.findall(r'^ENTRYPOINT \["(\w+)"\]$', final, re.MULTILINE)
    assert entry in PROJECT["project"]["scripts"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.suffix)
def test_images_run_as_the_users_of_the_pods(path: Path) -> None:
    (user,) = re.findall(r"^USER (\d+):(\d+)$", path.read_text(), re.MULTILINE)
    values = yaml.safe_load((ROOT / "charts" / "loractl" / "values.yaml").read_text())
    for part in ("server", "hub"):
        context = values[part]["podSecurityContext"]
        assert user == (str(context["runAsUser"]), str(context["runAsGroup"]))


def test_promises_of_the_chart_name_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "charts" / "README.md").read_text()))
    there = {
        name
        for path in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(named) > 20
    assert named <= there
