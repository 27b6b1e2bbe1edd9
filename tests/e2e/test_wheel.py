"""The wheel that people install: built from the sdist, alone in a clean environment, it runs."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_wheel_holds_every_module_and_data_file_on_disk(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    on_disk = {
        f"loractl/{path.relative_to(ROOT)}"
        for top in ("adapters", "hub", "server", "cli")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert on_disk <= packed
    assert not any(name.startswith("loractl/tests") for name in packed)


def test_installed_wheel_runs_help_and_doctor(wheel: Path, tmp_path: Path) -> None:
    # The dependencies come from this environment; only the package itself is new, so the checkout cannot be what runs.
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    site = next(environment.glob("lib/python*/site-packages"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run = [str(environment / "bin" / "python"), "-I", "-m", "loractl.cli"]
    shown = subprocess.run([*run, "--help"], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert "train" in shown.stdout
    where = subprocess.run(
        [run[0], "-I", "-c", "import loractl.adapters; print(loractl.adapters.__file__)"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert str(environment) in where.stdout
    subprocess.run([*run, "doctor"], check=True, capture_output=True, cwd=tmp_path)
