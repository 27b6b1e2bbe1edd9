"""Runs the checks of tests/conformance against a hub, with any client, and writes JUnit. Judges nothing itself.

    HF_ENDPOINT=http://hub:8700 HF_TOKEN=... python tests/support/run_conformance.py     any hub, the client installed
    python tests/support/run_conformance.py --all           hubs of our own: every client, with Xet and without

Clients are prepared once in ~/.cache/loractl/clients, each in a folder of its own that goes before everything else.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hub_process import hub_process

_SUPPORT = Path(__file__).parent
_HERE = _SUPPORT.parent / "conformance"

CLIENTS = ("0.36.2", "1.15.0", "newest")
OLDEST, NEWEST = CLIENTS[0], CLIENTS[-1]
BACKENDS = ("sqlite", "postgres-s3")
CATEGORIES = ("pull", "push", "refs", "management", "cli", "loaders")


@dataclass(frozen=True, slots=True)
class Combination:
    """One client against one kind of hub."""

    client: str
    xet: bool
    backend: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.client}-{'xet' if self.xet else 'noxet'}"


def client_folder(version: str) -> Path | None:
    """The folder of a client, prepared on first use; None for the one that is installed, the newest."""
    if version == NEWEST:
        return None
    folder = Path.home() / ".cache" / "loractl" / "clients" / f"hf-{version}"
    folder = (
        Path(os.environ["LORACTL_CACHE"]) / "clients" / f"hf-{version}" if "LORACTL_CACHE" in os.environ else folder
    )
    if not (folder / "huggingface_hub").is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as staged:
            wanted = [f"huggingface_hub=={version}", "hf-xet"]
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", f"{staged}/client", *wanted]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            Path(f"{staged}/client").rename(folder)
    return folder


def run_checks(
    endpoint: str,
    token: str,
    *,
    client: Path | None,
    xet: bool,
    junit: Path,
    categories: tuple[str, ...] = CATEGORIES,
    environment: dict[str, str] | None = None,
    options: tuple[str, ...] = (),
) -> int:
    """Run the checks in a process of their own, since a client reads its settings when it is imported."""
    junit.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home:
        settings = dict(os.environ) | (environment or {})
        settings |= {"HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HOME": home}
        paths = [str(client)] if client is not None else []
        settings["PYTHONPATH"] = os.pathsep.join(paths)
        settings.pop("HF_HUB_DISABLE_XET", None)
        if not xet:
            settings["HF_HUB_DISABLE_XET"] = "1"
        files = [str(_HERE / f"check_{category}.py") for category in categories]
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "python_files=check_*.py",
            "-o", f"pythonpath={_SUPPORT} {_HERE}", f"--junitxml={junit}", *options, *files,
        ]  # fmt: skip
        return subprocess.run(command, env=settings, cwd=_HERE.parent.parent, check=False).returncode


def run_combination(
    one: Combination, *, junit: Path, categories: tuple[str, ...] = CATEGORIES, options: tuple[str, ...] = ()
) -> int:
    """Start a hub of our own and run one combination against it; the exit status of the checks."""
    with contextlib.ExitStack() as stack:
        environment = stack.enter_context(backend_environment(one.backend))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hub = stack.enter_context(hub_process(folder / "hub", environment))
        return run_checks(
            hub.url,
            hub.admin,
            client=client_folder(one.client),
            xet=one.xet,
            junit=junit,
            categories=categories,
            options=options,
        )


@contextlib.contextmanager
def backend_environment(backend: str) -> Iterator[dict[str, str]]:
    """What a hub's environment holds for this kind of database and blobs; servers run until the block ends."""
    if backend == "sqlite":
        yield {}
        return
    from live_postgres import live_postgres
    from live_s3 import live_s3

    with live_postgres() as postgres, live_s3() as s3:
        place = {
            "LORACTL_HUB_DATABASE_URL": postgres.create_database("conformance"),
            "LORACTL_HUB_BLOBS": s3.url("conformance"),
        }
        yield place | s3.environment()


def combinations() -> list[Combination]:
    """The whole matrix."""
    return [Combination(client, xet, backend) for backend in BACKENDS for client in CLIENTS for xet in (True, False)]


def main() -> int:
    """Run what the command line asks for; 0 when everything passed."""
    parser = argparse.ArgumentParser(description="Hold a hub to the Hugging Face protocol.")
    parser.add_argument("--all", action="store_true", help="hubs of our own, every client, with Xet and without")
    parser.add_argument("--only", default="", metavar="TEXT", help="only combinations whose name holds TEXT")
    parser.add_argument("--category", action="append", choices=CATEGORIES, help="one category; may be repeated")
    parser.add_argument("--junit", type=Path, default=Path("build/conformance"), help="folder of the reports")
    arguments, options = parser.parse_known_args()
    if not arguments.all:
        endpoint, token = os.environ.get("HF_ENDPOINT"), os.environ.get("HF_TOKEN")
        if not endpoint or not token:
            parser.error("set HF_ENDPOINT and HF_TOKEN, or give --all")
        return run_checks(
            endpoint,
            token,
            client=None,
            xet="HF_HUB_DISABLE_XET" not in os.environ,
            junit=arguments.junit / "report.xml",
            categories=tuple(arguments.category or CATEGORIES),
            options=tuple(options),
        )
    failed = []
    for one in combinations():
        if arguments.only in str(one):
            print(f"== {one}", flush=True)
            if run_combination(
                one,
                junit=arguments.junit / f"{one}.xml",
                categories=tuple(arguments.category or CATEGORIES),
                options=tuple(options),
            ):
                failed.append(str(one))
    print("conformance:", f"failed: {', '.join(failed)}" if failed else "all combinations passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
