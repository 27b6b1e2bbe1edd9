"""Hostile adapters, made by code: each is a sound one with exactly one thing wrong, and the check that must find it."""

import io
import json
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{PREFIX}.lora_A.weight", f"{PREFIX}.lora_B.weight"

Files = dict[str, bytes]


def safetensors_bytes(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    """Put a file together from a header, as given, and its data."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def sound_config(**changes: Any) -> bytes:
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
    }
    return json.dumps(settings | changes).encode()


def weights(a: Any = None, b: Any = None, **more: Any) -> bytes:
    """A file of q_proj's A [4, 64] and B [64, 4] in float32; `more` tensors by their full names."""
    generator = np.random.default_rng(0)
    tensors = {
        A: generator.normal(size=(4, 64)) if a is None else a,
        B: generator.normal(size=(64, 4)) if b is None else b,
        **more,
    }
    header: dict[str, Any] = {}
    data = b""
    for name, value in tensors.items():
        raw = np.asarray(value, dtype=np.float32)
        header[name] = entry(list(raw.shape), len(data), len(data) + raw.nbytes)
        data += raw.tobytes()
    return safetensors_bytes(header, data)


def sound_files() -> Files:
    return {CONFIG: sound_config(), WEIGHTS: weights(), "README.md": b"# an adapter\n"}


_DATA = b"\x01" * 2048
_SOUND = {A: entry([4, 64], 0, 1024), B: entry([64, 4], 1024, 2048)}


def _header(header: dict[str, Any] | bytes, data: bytes = _DATA) -> Files:
    return {WEIGHTS: safetensors_bytes(header, data)}


def _duplicate() -> bytes:
    one, two = json.dumps(_SOUND[A]), json.dumps(_SOUND[B])
    return f'{{"{A}":{one},"{B}":{two},"{B}":{two}}}'.encode()


def _nan() -> Any:
    values = np.ones((4, 64), dtype=np.float32)
    values[3, 63] = np.nan
    return values


def _halves(dtype: str) -> dict[str, Any]:
    return {A: entry([4, 64], 0, 512, dtype), B: entry([64, 4], 512, 1024, dtype)}


def _zipped(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, b"x" * 2000)
    return stream.getvalue()


# name -> (check that must refuse it, files put over a sound adapter)
HOSTILE: dict[str, tuple[str, Callable[[], Files]]] = {
    "overlap": ("E_ST_HEADER", lambda: _header({A: entry([4, 64], 0, 1024), B: entry([64, 4], 1000, 2024)})),
    "hole": (
        "E_ST_HEADER",
        lambda: _header({A: entry([4, 64], 0, 1024), B: entry([64, 4], 1028, 2052)}, _DATA + b"1234"),
    ),
    "trailing bytes": ("E_ST_HEADER", lambda: _header(_SOUND, _DATA + b"x")),
    "truncated": ("E_ST_HEADER", lambda: _header(_SOUND, _DATA[:-1])),
    "header length 2^64-1": ("E_ST_HEADER", lambda: {WEIGHTS: b"\xff" * 8 + weights()[8:]}),
    "header length 101 MB": ("E_ST_HEADER", lambda: {WEIGHTS: struct.pack("<Q", 101 << 20) + weights()[8:]}),
    "shape and bytes disagree": ("E_ST_HEADER", lambda: _header(_SOUND | {A: entry([4, 65], 0, 1024)})),
    "shape overflow": ("E_ST_HEADER", lambda: _header(_SOUND | {A: entry([1 << 62, 1 << 62, 4], 0, 1024)})),
    "negative dimension": ("E_ST_HEADER", lambda: _header(_SOUND | {A: entry([-4, -64], 0, 1024)})),
    "true as dimension": ("E_ST_HEADER", lambda: _header(_SOUND | {A: entry([True, 256], 0, 1024)})),
    "unknown dtype": ("E_ST_HEADER", lambda: _header(_SOUND | {A: entry([4, 64], 0, 1024, "X32")})),
    "metadata not text": ("E_ST_HEADER", lambda: _header(_SOUND | {"__metadata__": {"a": 1}})),
    "metadata nested": ("E_ST_HEADER", lambda: _header(_SOUND | {"__metadata__": {"a": {"b": "c"}}})),
    "extra field": ("E_ST_HEADER", lambda: _header(_SOUND | {A: _SOUND[A] | {"x": 1}})),
    "duplicate key": ("E_ST_HEADER", lambda: _header(_duplicate())),
    "leading spaces": ("E_ST_HEADER", lambda: _header(b"  " + json.dumps(_SOUND).encode())),
    "trailing newline": ("E_ST_HEADER", lambda: _header(json.dumps(_SOUND).encode() + b"\n")),
    "not JSON": ("E_ST_HEADER", lambda: _header(b"{" + b"x" * 40 + b"}")),
    "not UTF-8": ("E_ST_HEADER", lambda: _header(b'{"\xff\xfe":1}')),
    "NaN in the header": ("E_ST_HEADER", lambda: _header(b'{"a":NaN}')),
    "nested deep": ("E_ST_HEADER", lambda: _header(b'{"a":' * 30_000 + b"1" + b"}" * 30_000)),
    "300,000 tensors": (
        "E_ST_HEADER",
        lambda: _header(b"{" + b",".join(b'"%d":{}' % i for i in range(300_000)) + b"}"),
    ),
    "path as tensor name": ("E_ST_NAMES", lambda: _header({"../../etc/passwd": entry([4, 64], 0, 1024), B: _SOUND[B]})),
    "slash in tensor name": ("E_ST_NAMES", lambda: _header({"a/b": entry([4, 64], 0, 1024), B: _SOUND[B]})),
    "zero-size tensor": ("E_EMPTY", lambda: {WEIGHTS: weights(a=np.zeros((0, 64)), z=np.zeros(600))}),
    "no tensors": ("E_EMPTY", lambda: _header(b"{}" + b" " * 2000, b"")),
    "40 bytes": ("E_EMPTY", lambda: {WEIGHTS: safetensors_bytes(b"{}" + b" " * 30, b"")}),
    "NaN": ("E_NONFINITE", lambda: {WEIGHTS: weights(a=_nan())}),
    "infinity": ("E_NONFINITE", lambda: {WEIGHTS: weights(b=np.full((64, 4), np.inf))}),
    "A without B": ("E_AB", lambda: {WEIGHTS: safetensors_bytes({A: entry([4, 128], 0, 2048)}, _DATA)}),
    "rank beside the config": ("E_AB", lambda: {CONFIG: sound_config(r=8)}),
    "A and B of two ranks": ("E_AB", lambda: {WEIGHTS: weights(b=np.ones((64, 5)))}),
    "A and B of two dtypes": (
        "E_AB",
        lambda: _header({A: entry([4, 64], 0, 1024), B: entry([64, 4], 1024, 1536, "F16")}, _DATA[:1536]),
    ),
    "target without tensors": ("E_TARGETS", lambda: {CONFIG: sound_config(target_modules=["q_proj", "v_proj"])}),
    "tensors outside the targets": ("E_TARGETS", lambda: {CONFIG: sound_config(target_modules="v_proj")}),
    "whole weight": ("E_TARGETS", lambda: {WEIGHTS: weights(**{"base_model.model.lm_head.weight": np.ones((9, 9))})}),
    "weight of the base": (
        "E_TARGETS",
        lambda: {WEIGHTS: weights(**{"base_model.model.lm_head.base_layer.weight": np.ones((9, 9))})},
    ),
    "rank 0": ("E_CFG", lambda: {CONFIG: sound_config(r=0)}),
    "rank as text": ("E_CFG", lambda: {CONFIG: sound_config(r="4")}),
    "rank 1025": ("E_CFG", lambda: {CONFIG: sound_config(r=1025)}),
    "alpha NaN": ("E_CFG", lambda: {CONFIG: sound_config(lora_alpha=float("nan"))}),
    "broken expression": ("E_CFG", lambda: {CONFIG: sound_config(target_modules="((")}),
    "long expression": ("E_CFG", lambda: {CONFIG: sound_config(target_modules="q" * 5000)}),
    "expression without end": (
        "E_CFG",
        lambda: {CONFIG: sound_config(target_modules=r"(?:(?:.|.)+)+[0-9]")},
    ),
    "config is a list": ("E_CFG", lambda: {CONFIG: b"[]"}),
    "config twice the key": (
        "E_CFG",
        lambda: {CONFIG: b'{"peft_type":"LORA","r":4,"r":8,"target_modules":["q_proj"]}'},
    ),
    "library to import": ("E_IMPORT", lambda: {CONFIG: sound_config(auto_mapping={"parent_library": "evil.module"})}),
    "megatron module": ("E_IMPORT", lambda: {CONFIG: sound_config(megatron_config={}, megatron_core="evil")}),
    "megatron name alone": ("E_IMPORT", lambda: {CONFIG: sound_config(megatron_core="evil")}),
    "base is a path": ("E_LOCALPATH", lambda: {CONFIG: sound_config(base_model_name_or_path="/home/me/base")}),
    "base is a drive": ("E_LOCALPATH", lambda: {CONFIG: sound_config(base_model_name_or_path="C:\\base")}),
    "base is empty": ("E_LOCALPATH", lambda: {CONFIG: sound_config(base_model_name_or_path="")}),
    "pickle by name": ("E_PICKLE", lambda: {"adapter_model.bin": b"anything"}),
    "pickle by content": ("E_PICKLE", lambda: {WEIGHTS: b"\x80\x04\x95" + b"x" * 4000}),
    "zip called weights": ("E_PICKLE", lambda: {WEIGHTS: b"PK\x03\x04" + b"x" * 4000}),
    "numpy file": ("E_PICKLE", lambda: {"notes.txt": b"\x93NUMPY" + b"x" * 100}),
    "old pickle": ("E_PICKLE", lambda: {"notes.txt": b"cos\nsystem\n(S'id'\ntR."}),
    "python file": ("E_CODE", lambda: {"modeling.py": b"import os"}),
    "shared object": ("E_CODE", lambda: {"kernel.so": b"\x7fELF"}),
    "auto_map": ("E_CODE", lambda: {"tokenizer_config.json": b'{"auto_map":{"AutoTokenizer":"evil.Tok"}}'}),
    "parent folder": ("E_PATH", lambda: {"../x.txt": b"x"}),
    "absolute path": ("E_PATH", lambda: {"/etc/passwd": b"x"}),
    "backslash": ("E_PATH", lambda: {"a\\b.txt": b"x"}),
    "git folder": ("E_PATH", lambda: {".git/config": b"x"}),
    "control character": ("E_PATH", lambda: {"a\x01b": b"x"}),
    "decomposed Unicode": ("E_PATH", lambda: {"e\u0301.txt": b"x"}),
    "reserved on Windows": ("E_PATH", lambda: {"NUL.txt": b"x"}),
    "same but for case": ("E_PATH", lambda: {"readme.md": b"x"}),
    "file and folder": ("E_PATH", lambda: {"notes": b"x", "notes/a.txt": b"x"}),
    "long part": ("E_PATH", lambda: {"x" * 256: b"x"}),
    "too many files": ("E_SIZE", lambda: {f"f{i}.txt": b"x" for i in range(1001)}),
    "offsets in reverse": (
        "E_ST_HEADER",
        lambda: _header(_SOUND | {A: {"dtype": "F32", "shape": [4, 64], "data_offsets": [1024, 0]}}),
    ),
    "offset with a fraction": (
        "E_ST_HEADER",
        lambda: _header(_SOUND | {A: {"dtype": "F32", "shape": [4, 64], "data_offsets": [0, 1024.0]}}),
    ),
    "nine dimensions": ("E_ST_HEADER", lambda: _header(_SOUND | {A: entry([4, 64, *[1] * 7], 0, 1024)})),
    "20,001 sound tensors": (
        "E_ST_HEADER",
        lambda: _header({f"a{i}": entry([1], i, i + 1, "U8") for i in range(20_001)}, b"x" * 20_001),
    ),
    "NaN in F16": ("E_NONFINITE", lambda: _header(_halves("F16"), b"\xff\x7f" * 512)),
    "infinity in BF16": ("E_NONFINITE", lambda: _header(_halves("BF16"), b"\x80\x7f" * 512)),
    "zip after the weights": ("E_ST_HEADER", lambda: {WEIGHTS: weights() + _zipped("data.pkl")}),
    "pickle in a zip": ("E_PICKLE", lambda: {"notes.dat": _zipped("archive/data.pkl")}),
    "pickle by a name in capitals": ("E_PICKLE", lambda: {"MODEL.CKPT": b"anything"}),
    "magnitude of another length": (
        "E_AB",
        lambda: {
            CONFIG: sound_config(use_dora=True),
            WEIGHTS: weights(**{f"{PREFIX}.lora_magnitude_vector.weight": np.ones(63)}),
        },
    ),
    "rank beside its pattern": ("E_AB", lambda: {CONFIG: sound_config(rank_pattern={"q_proj": 8})}),
    "rank below zero": ("E_CFG", lambda: {CONFIG: sound_config(r=-1)}),
    "true as rank": ("E_CFG", lambda: {CONFIG: sound_config(r=True)}),
    "alpha 0": ("E_CFG", lambda: {CONFIG: sound_config(lora_alpha=0)}),
    "alpha infinite": ("E_CFG", lambda: {CONFIG: sound_config(lora_alpha=float("inf"))}),
    "config without a kind": ("E_CFG", lambda: {CONFIG: b"{}"}),
    "config nested deep": ("E_CFG", lambda: {CONFIG: b'{"a":' * 30_000 + b"1" + b"}" * 30_000}),
    "config with a long number": ("E_CFG", lambda: {CONFIG: b'{"r":' + b"9" * 10_000 + b"}"}),
    "base at home": ("E_LOCALPATH", lambda: {CONFIG: sound_config(base_model_name_or_path="~/base")}),
    "base nearby": ("E_LOCALPATH", lambda: {CONFIG: sound_config(base_model_name_or_path="../base")}),
    "file to read at the start": (
        "E_LOCALPATH",
        lambda: {CONFIG: sound_config(corda_config={"cache_file": "/etc/passwd"})},
    ),
    "trust_remote_code": ("E_CODE", lambda: {"config.json": b'{"trust_remote_code":true}'}),
    "auto_map inside": ("E_CODE", lambda: {"x.json": b'{"a":[{"auto_map":{"AutoModel":"evil.Model"}}]}'}),
    "cache folder": ("E_PATH", lambda: {".cache/x": b"x"}),
    "long path": ("E_PATH", lambda: {"/".join(["d" * 100] * 11): b"x"}),
    "NUL in a name": ("E_PATH", lambda: {"a\0b": b"x"}),
    "half a surrogate": ("E_PATH", lambda: {"a\ud800": b"x"}),
    "colon": ("E_PATH", lambda: {"a:b.txt": b"x"}),
    "dot at the end": ("E_PATH", lambda: {"a./b.txt": b"x"}),
    "same but for case in Unicode": ("E_PATH", lambda: {"straße.txt": b"x", "STRASSE.txt": b"x"}),
    "fingerprint is none": ("E_BASE_PIN", lambda: {"loractl.json": b'{"base":{"id":"x","fingerprint":"abc"}}'}),
    "manifest of the future": ("E_BASE_PIN", lambda: {"loractl.json": b'{"schema_version":99}'}),
}
