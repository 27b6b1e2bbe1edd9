"""Those who load adapters: PEFT, transformers and vLLM's way to an adapter, each with endpoint and token alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, __version__

from faulty_proxy import faulty_proxy

pytestmark = pytest.mark.skipif(
    tuple(int(part) for part in __version__.split(".")[:2]) < (1, 31),
    reason="transformers asks for huggingface_hub >= 1.31",
)

_BASE = """
import sys
from tiny_models import make_adapter, make_tiny_base
from pathlib import Path
folder = Path(sys.argv[1])
make_adapter(make_tiny_base(folder / "tiny-base"), folder / "adapter", seed=3)
"""

_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, folder, repo = sys.argv[1:]
ids = torch.arange(3, 12)[None]
def logits(source, **more):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, source, **more)(ids).logits
expected = logits(folder)
for revision in ("v1", "main", "prod", None):
    more = {} if revision is None else {"revision": revision}
    assert torch.equal(logits(repo, **more), expected), revision
"""

_TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
base, folder, repo = sys.argv[1:]
ids = torch.arange(3, 12)[None]
def logits(source, **more):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = model(ids).logits
    model.load_adapter(source, **more)
    adapted = model(ids).logits
    assert not torch.equal(plain, adapted)
    return adapted
expected = logits(folder)
assert torch.equal(logits(repo), expected)
assert torch.equal(logits(repo, adapter_kwargs={"revision": "v1"}), expected)
"""

# What vLLM 0.33 does between a request for org/name and its weights, in vllm/lora/utils.py (`--lora-modules`) and in
# vllm/plugins/lora_resolvers/hf_hub_resolver.py, with the same client calls and no engine.
_VLLM = """
import json, os, sys
from huggingface_hub import HfApi
_, folder, repo = sys.argv[1:]
api = HfApi()
whole = api.snapshot_download(repo_id=repo)
files = api.list_repo_files(repo_id=repo)
folders = {os.path.dirname(name) for name in files if name.endswith("adapter_config.json")}
assert "" in folders
resolved = api.snapshot_download(repo_id=repo, allow_patterns="*")
with open(os.path.join(resolved, "adapter_config.json")) as stream:
    config = json.load(stream)
assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "tiny-base"
for name in ("adapter_config.json", "adapter_model.safetensors"):
    with open(os.path.join(whole, name), "rb") as one, open(os.path.join(folder, name), "rb") as other:
        assert one.read() == other.read()
"""

# The resolver itself, where vLLM is installed.
_VLLM_RESOLVER = """
import asyncio, sys
from vllm.plugins.lora_resolvers.hf_hub_resolver import HfHubResolver
repo = sys.argv[1]
found = asyncio.run(HfHubResolver([repo]).resolve_lora("tiny-base", repo))
print("PATH", found.lora_path)
assert asyncio.run(HfHubResolver([repo]).resolve_lora("another-base", repo)) is None
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base and an adapter of it, made in a process of its own."""
    folder = tmp_path_factory.mktemp("models")
    support = Path(__file__).parent.parent / "support"
    path = os.pathsep.join([str(support), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    _run(dict(os.environ) | {"PYTHONPATH": path}, _BASE, str(folder))
    return folder


def _run(environment: dict[str, str], program: str, *arguments: str, python: str = sys.executable) -> str:
    done = subprocess.run(
        [python, "-c", program, *arguments], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def loaded(api: HfApi, repo: str, models: Path) -> str:
    api.upload_folder(repo_id=repo, folder_path=models / "adapter")
    api.create_branch(repo, branch="prod")
    return repo


@pytest.mark.parametrize("program", [_PEFT, _TRANSFORMERS, _VLLM], ids=["peft", "transformers", "vllm-calls"])
def test_adapter_is_loaded_by_name(client_environment: dict[str, str], loaded: str, models: Path, program: str) -> None:
    _run(client_environment, program, str(models / "tiny-base"), str(models / "adapter"), loaded)


def test_no_loader_is_led_to_a_pickle(
    endpoint: str, client_environment: dict[str, str], loaded: str, models: Path
) -> None:
    with faulty_proxy(endpoint) as proxy:
        arguments = (str(models / "tiny-base"), str(models / "adapter"), loaded)
        _run(client_environment | {"HF_ENDPOINT": proxy.url}, _PEFT, *arguments)
        assert [path for path in proxy.paths("GET") if path.endswith(".bin")] == []


def test_vllms_own_resolver_finds_the_adapter(client_environment: dict[str, str], loaded: str) -> None:
    python = os.environ.get("LORACTL_VLLM_PYTHON")
    if python is None:
        pytest.skip("no vLLM here: LORACTL_VLLM_PYTHON names a Python that has it")
    environment = {key: value for key, value in client_environment.items() if key != "PYTHONPATH"}
    out = _run(environment, _VLLM_RESOLVER, loaded, python=python)
    found = next(line.removeprefix("PATH ") for line in out.splitlines() if line.startswith("PATH "))
    assert json.loads((Path(found) / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-base"
