"""`loractl doctor`: what this machine can do, asked of the machine itself."""

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from loractl.adapters.byte_sizes import file_size, memory_size
from loractl.adapters.host_memory import free_memory
from loractl.adapters.host_processors import keep_threads_to_processors
from loractl.cli.output import print_json

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "huggingface_hub", "safetensors", "litestar")


@click.command(short_help="Say what this machine can do.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def doctor(*, as_json: bool) -> None:
    """Say what this machine can do: versions, device, number formats, memory, hub and server.

    \b
    Examples:
      loractl doctor
      loractl doctor --json | jq .device
    """
    facts = {
        "loractl": importlib.metadata.version("loractl"),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "device": _device(),
        "memory": _memory(),
        "disk_free_bytes": shutil.disk_usage(Path.home()).free,
        "hub": _service("LORACTL_HUB", "http://127.0.0.1:8700"),
        "server": _service("LORACTL_SERVER", "http://127.0.0.1:8800"),
    }
    if as_json:
        print_json(facts)
        return
    _print(facts)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> dict[str, Any]:
    import torch

    keep_threads_to_processors()
    facts: dict[str, Any] = {
        "kind": "cuda" if torch.cuda.is_available() else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "bfloat16": _multiplies(torch.bfloat16),
        "int8": _multiplies_int8(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"name": properties.name, "gpu_memory_bytes": properties.total_memory}
    return facts


def _multiplies(dtype: Any) -> bool:
    import torch

    ones = torch.ones(4, 4, dtype=dtype)
    try:
        return bool((ones @ ones == 4).all())
    except RuntimeError:
        return False


def _multiplies_int8() -> bool:
    import torch

    ones = torch.ones(32, 32, dtype=torch.int8)
    try:
        return bool((torch._int_mm(ones, ones) == 32).all())
    except RuntimeError:
        return False


def _memory() -> dict[str, Any]:
    free = free_memory()
    return {
        "total_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free_bytes": free.size_bytes,
        "limit": free.limit,
    }


def _service(variable: str, default: str) -> dict[str, Any]:
    import httpx

    url = os.environ.get(variable, default)
    try:
        reachable = httpx.get(f"{url.rstrip('/')}/healthz", timeout=1.0).is_success
    except httpx.HTTPError:
        reachable = False
    return {"url": url, "reachable": reachable, "configured": variable in os.environ}


def _print(facts: dict[str, Any]) -> None:
    device, memory = facts["device"], facts["memory"]
    free = memory_size(memory["free_bytes"])
    yes = {True: "yes", False: "no"}
    lines = {
        "loractl": f"{facts['loractl']} on Python {facts['python']}",
        "libraries": ", ".join(f"{name} {version or 'missing'}" for name, version in facts["libraries"].items()),
        "device": device.get("name") or f"CPU, {device['cpu_capability']}, {device['num_threads']} threads",
        "formats": f"bfloat16 {yes[device['bfloat16']]}, int8 {yes[device['int8']]}",
        "memory": f"{free} free of {memory_size(memory['total_bytes'])}, by {memory['limit']}",
        "disk": f"{file_size(facts['disk_free_bytes'])} free in the home folder",
        "hub": _service_line(facts["hub"], start="loractl hub serve"),
        "server": _service_line(facts["server"], start="loractl serve BASE"),
    }
    for name, text in lines.items():
        click.echo(f"{name:<10} {text}")
    missing = [name for name, version in facts["libraries"].items() if version is None]
    if missing:
        click.echo(f"\nmissing: {', '.join(missing)}; reinstall loractl", err=True)
        sys.exit(1)


def _service_line(service: dict[str, Any], *, start: str) -> str:
    if service["reachable"]:
        return f"answers at {service['url']}"
    return f"no answer at {service['url']} (start one with `{start}`)"
