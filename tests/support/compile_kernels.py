"""Compiles every kernel of the card's path for real cards on a machine without one; prints one line a kernel.

    python tests/support/compile_kernels.py [80 90] [--in-turns]

With --in-turns each kernel is compiled for one of the cards alone, the next kernel for the next card.
Run it without TRITON_INTERPRET: kernels are read when their modules are imported.
"""

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loractl.server.engine.kernels.cuda import grouped_lora, int8_matmul, paged

_LORA = {
    "CHUNK": 16, "RANKS": 16, "PRECISION": "tf32", "HAS_GAIN": False, "HAS_BIAS": False, "GAIN_BIT": 1 << 16,
    "BLOCK_K": 128, "BLOCK_N": 128, "PARTS": 4, "WIDE": False,
}  # fmt: skip
_ATTENTION = {
    "DIM": 128, "BLOCK_D": 128, "BLOCK_SIZE": 16, "GROUP": 4, "ROWS": 16, "TOKENS": 64, "PARTS": 8, "LEAST": 128,
    "HAS_CAP": False, "HAS_SINKS": False, "WIDE": False, "PRECISION": "tf32", "BLOCK": 1024,
}  # fmt: skip
_INT8 = {"HAS_BIAS": False, "BLOCK": 4096}
_INDICES = {"slots": "*i32", "rows": "*i32", "codes": "*i32", "tables": "*i32", "lengths": "*i32", "starts": "*i32"}
_INDICES |= {"tiles": "*i32", "places": "*i64", "weights": "*fp32", "middle": "*fp32", "sums": "*fp32"}
_INDICES |= {"tops": "*fp32", "totals": "*fp32", "sinks": "*fp32", "scale": "fp32", "softcap": "fp32"}
_POINTERS = {"x", "a", "b", "out", "base", "bias", "gain", "q", "k", "v", "k_cache", "v_cache"}
_CASES: list[tuple[str, Any, dict[str, Any], dict[str, str]]] = [
    ("shrink", grouped_lora._shrink, _LORA, {}),
    ("expand", grouped_lora._expand, _LORA, {}),
    ("expand with gain", grouped_lora._expand, _LORA | {"HAS_GAIN": True, "HAS_BIAS": True}, {}),
    ("quantize", int8_matmul._quantize, _INT8, {"codes": "*i8", "scales": "*fp32"}),
    *[
        (
            f"int8 product, {rows} rows",
            int8_matmul._matmul,
            _INT8 | int8_matmul.tile_of(rows, 4096),
            {"x": "*i8", "weight": "*i8", "x_scale": "*fp32", "row_scale": "*fp32"},
        )
        for rows in (1, 64, 512)
    ],
    ("write k and v", paged._write, _ATTENTION, {}),
    ("attention, one row", paged._decode, _ATTENTION, {}),
    ("attention, merge", paged._merge, _ATTENTION, {}),
    ("attention, tiles", paged._prefill, _ATTENTION | {"ROWS": 64}, {}),
]


def compile_one(kernel: Any, sizes: dict[str, Any], types: dict[str, str], arch: int) -> dict[str, Any]:
    constants = {name: sizes[name] for name in kernel.arg_names if name.isupper()}
    signature = {
        name: "constexpr"
        if name.isupper()
        else types.get(name) or _INDICES.get(name) or ("*bf16" if name in _POINTERS else "i32")
        for name in kernel.arg_names
    }
    # What a launch finds out by itself: pointers and strides that are multiples of 16.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name][0] == "*" or name in {"d_in", "d_out", "d", "x_row", "out_row", "a_slot", "b_slot", "q_row"}
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {name: sizes[name] for name in ("num_warps", "num_stages") if name in sizes}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = made.asm["ptx"]
    return {
        "shared_bytes": made.metadata.shared,
        "cubin_bytes": len(made.asm["cubin"]),
        "tensor_cores": "wgmma" in ptx or "mma.sync" in ptx,
        "wide_loads": "v4.b32" in ptx or "cp.async" in ptx,
        "spills": ".local" in ptx,
    }


def main() -> None:
    archs = [int(value) for value in sys.argv[1:] if value.isdecimal()] or [80, 90]
    for place, (name, kernel, sizes, types) in enumerate(_CASES):
        for arch in [archs[place % len(archs)]] if "--in-turns" in sys.argv else archs:
            print(json.dumps({"kernel": name, "arch": arch, **compile_one(kernel, sizes, types, arch)}), flush=True)


if __name__ == "__main__":
    main()
