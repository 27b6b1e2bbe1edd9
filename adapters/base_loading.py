"""Loads a frozen base model into memory, quantized as asked. The one place that knows bitsandbytes' ways and noises.

Training and serving both load through here, so that an adapter is trained on the very numbers it is served on.
"""

import importlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loractl.adapters.errors import Incompatible, NotFound, UsageError, WillNotFit
from loractl.adapters.host_processors import keep_threads_to_processors
from loractl.adapters.manifest import Quantization

if TYPE_CHECKING:
    import torch

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Kind = Literal["linear", "scales", "embedding", "other"]

# With a threshold, one row's outliers move a column to fp16 for every row of the call, and each layer waits for the
# host; without one, rows are independent of their neighbours.
INT8_THRESHOLD = 0.0


def load_base_model(
    folder: Path, *, quantization: Quantization = "int8", dtype: Dtype = "auto", device: str | None = None
) -> Any:
    """Load a causal language model, frozen and in eval mode, on CUDA where there is one, else on the CPU.

    `dtype` is what is computed in and what unquantized weights are held in.
    Raises NotFound, Incompatible or WillNotFit.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        raise NotFound(f"{folder}: no config.json", hint="a base is a folder in transformers' format, or a hub repo id")
    teach_layout(folder)
    keep_threads_to_processors()
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    compute = pick_dtype(dtype, device=where)
    quiet_libraries()
    try:
        with _no_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=compute,
                device_map={"": where},
                quantization_config=_quantization_config(quantization, compute=compute),
                local_files_only=True,
                trust_remote_code=False,
            )
    except (ValueError, KeyError) as error:
        raise Incompatible(
            f"{folder.name}: transformers cannot load this base: {error}",
            hint="a base is a causal language model that transformers itself defines; code in the folder is never run",
        ) from error
    except torch.OutOfMemoryError as error:
        raise WillNotFit(
            f"{folder.name} does not fit on {where} as {quantization}", hint="try --quantize nf4"
        ) from error
    _keep_4bit_layout(model)
    return model.requires_grad_(False).eval()


def load_tokenizer(folder: Path) -> Any:
    """Load a base's tokenizer by transformers; code in the folder is never run."""
    from transformers import AutoTokenizer

    teach_layout(folder)
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def teach_layout(folder: Path) -> None:
    """Make transformers know a base whose own code it does not bring; raises Unsupported for one that cannot be.

    To be called before anything of transformers reads the folder.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    if config.get("model_type") == "baichuan":
        from loractl.adapters.baichuan import check_baichuan

        check_baichuan(config, where=folder.name)


def pick_dtype(dtype: Dtype, *, device: str) -> "torch.dtype":
    """Turn a name into torch's type; `auto` is bfloat16 where the device multiplies it natively, else float32."""
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype in names:
        return names[dtype]
    if dtype != "auto":
        raise UsageError(f"unknown dtype {dtype!r}", hint="auto, float32, bfloat16 or float16")
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("arm_bf16")
    return torch.bfloat16 if native else torch.float32


def memory_bytes(model: Any) -> dict[Kind, int]:
    """Count weights by kind: linear layers, their quantization scales, embeddings (a tied head once), other."""
    import torch

    sizes: dict[Kind, int] = {"linear": 0, "scales": 0, "embedding": 0, "other": 0}
    seen: set[int] = set()

    def add(kind: Kind, tensor: "torch.Tensor | None") -> None:
        if tensor is not None and tensor.numel() and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            sizes[kind] += tensor.numel() * tensor.element_size()

    modules = list(model.modules())
    for module in modules:
        if isinstance(module, torch.nn.Embedding):
            add("embedding", module.weight)
    for module in modules:
        if isinstance(module, torch.nn.Linear):
            add("linear", module.weight.data)
            for scale in _scales(module):
                add("scales", scale)
    for tensor in (*model.parameters(), *model.buffers()):
        add("other", tensor)
    return sizes


def quiet_libraries() -> None:
    """Silence what the libraries say on every start or every call although nothing is wrong; the rest still speaks."""
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_not_cast_note)
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_kernels_note)
    with warnings.catch_warnings():
        # Importing bitsandbytes on a machine without a GPU makes torch import scripted modules of its own.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script", category=DeprecationWarning)
        importlib.import_module("bitsandbytes")


def _is_not_cast_note(record: logging.LogRecord) -> bool:
    return "inputs will be cast from" not in record.getMessage()


def _is_not_kernels_note(record: logging.LogRecord) -> bool:
    return "kernels-community" not in record.getMessage()


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


def _quantization_config(quantization: Quantization, *, compute: "torch.dtype") -> Any:
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=INT8_THRESHOLD)
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    if quantization == "none":
        return None
    raise UsageError(f"unknown quantization {quantization!r}", hint="int8, nf4 or none")


def _keep_4bit_layout(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first CPU forward in eval mode.

    The repacked bytes cannot be differentiated through, so a model that was evaluated once could not be trained.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _scales(module: Any) -> list["torch.Tensor | None"]:
    """The tensors beside the quantized weight: row maxima of int8, block maxima (quantized again) of nf4."""
    found = [getattr(module.weight, "SCB", None), getattr(getattr(module, "state", None), "SCB", None)]
    state = getattr(module.weight, "quant_state", None)
    if state is not None:
        found += [state.absmax, state.code, state.offset]
        if state.state2 is not None:
            found += [state.state2.absmax, state.state2.code]
    return found
