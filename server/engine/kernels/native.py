"""Compiles native.cpp once per machine and hands out its functions. Knows compilers and pointers, nothing of models.

Without a compiler, or on a processor without AVX-512 VNNI, `library()` is None and the callers' plain torch runs
instead. LORACTL_NATIVE=0 asks for that.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from loractl.adapters.base_identity import cache_folder

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=off")
NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"}
MAX_SITES = 4


class SiteStruct(ctypes.Structure):
    _fields_ = (
        ("a", c_void_p),
        ("b", c_void_p),
        ("ranks", c_void_p),
        ("slot_stride", c_int64),
        ("first_output", c_int64),
        ("num_outputs", c_int64),
    )


class BatchStruct(ctypes.Structure):
    _fields_ = (("order", c_void_p), ("firsts", c_void_p), ("slots", c_void_p), ("weights", c_void_p))


class LinearStruct(ctypes.Structure):
    _fields_ = (
        ("panels", c_void_p),
        ("scales", c_void_p),
        ("offsets", c_void_p),
        ("bias", c_void_p),
        ("d_in", c_int64),
        ("d_out", c_int64),
        ("num_sites", c_int64),
        ("sites", SiteStruct * MAX_SITES),
    )


class PagedStruct(ctypes.Structure):
    _fields_ = (
        ("tables", c_void_p),
        ("starts", c_void_p),
        ("lengths", c_void_p),
        ("places", c_void_p),
        ("table_width", c_int64),
        ("num_sequences", c_int64),
        ("block_size", c_int64),
        ("num_rows", c_int64),
    )


class HeadsStruct(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("heads", "kv_heads", "dim", "q_row", "q_head")),
        *((name, c_int64) for name in ("k_row", "k_head", "v_row", "v_head", "window")),
        ("sinks", c_void_p),
        ("scale", c_float),
        ("softcap", c_float),
    )


class LayerStruct(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, c_void_p) for name in ("norm", "mlp_norm", "q_norm", "k_norm", "k_cache", "v_cache")),
        ("heads", HeadsStruct),
        *((name, c_float) for name in ("norm_eps", "mlp_norm_eps", "head_norm_eps")),
        ("next", c_void_p),
    )


class MatrixCopyStruct(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("source", "to", "rows", "columns")),
        ("scale", c_float),
        ("format", c_int32),
        ("is_turned", c_int32),
    )


SIGNATURES = {
    "loractl_linear": (c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int, c_int, c_int),
    "loractl_rms_norm": (c_void_p, c_int64, c_void_p, c_float, c_void_p, c_int64, c_int64, c_int, c_int),
    "loractl_write_kv": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int),
    "loractl_layer": (*(c_void_p,) * 5, c_int64, c_void_p, c_void_p, c_int, c_int),
    "loractl_scan_rows": (c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int, c_int),
    "loractl_pack_adapter": (c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int),
    "loractl_want_large_pages": (c_void_p, c_int64),
    "loractl_run_alone": (),
    "loractl_end_team": (),
    "loractl_attention": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int),
}


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, compiling them on this machine's first use (some seconds), or None."""
    if os.environ.get("LORACTL_NATIVE") == "0" or not _processor_flags() >= NEEDED:
        return None
    try:
        loaded = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("CPU kernels could not be compiled, plain torch runs instead: %s", error)
        return None
    for name, types in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes = types
        function.restype = None
    return loaded


def run_alone() -> None:
    """Keep what the calling thread computes on that thread.

    Each thread that computes in parallel has a team of its own, and once the teams outnumber the processors OpenMP puts
    idle members to sleep at once: every small product of every team then pays for waking them.
    """
    loaded = library()
    if loaded is not None:
        torch.get_num_threads()  # torch sets a thread's number when it is first asked
        loaded.loractl_run_alone()


def end_team() -> None:
    """Let go of the threads that computed for the calling one; for a thread that hands the work to another."""
    loaded = library()
    if loaded is not None:
        loaded.loractl_end_team()


def zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As `torch.zeros`, on large pages where the machine has them: streams from memory stop at every small one."""
    made = torch.empty(shape, dtype=dtype, device=device)
    loaded = library() if device.type == "cpu" else None
    if loaded is not None:
        loaded.loractl_want_large_pages(made.data_ptr(), made.numel() * made.element_size())
    return made.zero_()


def fits(*tensors: torch.Tensor) -> bool:
    """Whether the compiled kernels take these: one dtype, float32 or bfloat16, on the CPU."""
    dtype = tensors[0].dtype
    return dtype in {torch.float32, torch.bfloat16} and all(
        t.dtype == dtype and t.device.type == "cpu" for t in tensors
    )


def _processor_flags() -> set[str]:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def _compiled() -> Path:
    """Return the shared library of this source, compiler and processor."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler (g++ or clang++) on the path")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=20).stdout
    sources = [path.read_bytes() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    what = [*sources, version, " ".join((*FLAGS, *sorted(_processor_flags()))).encode()]
    name = hashlib.sha256(b"\0".join(what)).hexdigest()[:24]
    target = cache_folder() / "native" / f"{name}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "native.so"
        subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(made)], capture_output=True, check=True, timeout=180)
        made.replace(target)
    return target
