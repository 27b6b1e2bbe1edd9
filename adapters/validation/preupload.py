"""Checks that need only a file's name, size and first bytes: a hub answers them before anything is uploaded."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

from loractl.adapters.validation.record import Choice, Finding, Policy

SAMPLE_BYTES = 512

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".dill"}
_CODE_SUFFIXES = {".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".ipynb", ".whl", ".egg"}
_ARCHIVE_SUFFIXES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}
_TOKENIZER_FILES = {
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
}
_WINDOWS_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
_FORBIDDEN_PARTS = {".", "..", ".git", ".cache"}
_FORBIDDEN_CHARACTERS = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')


def check_preupload(path: str, *, size_bytes: int, sample: bytes, policy: Policy | None = None) -> list[Finding]:
    """Check one file by its name, size and first 512 bytes."""
    chosen = policy or Policy()
    return [
        *check_path(path),
        *check_pickle(path, sample=sample),
        *check_code(path, sample=sample, tokenizer_files=chosen.tokenizer_files),
        *_check_file_size(path, size_bytes=size_bytes, policy=chosen),
    ]


def check_path(path: str) -> Iterator[Finding]:
    """Refuse a name that some file system cannot hold, or would take elsewhere."""
    if reason := _path_fault(path):
        shown = path.encode("utf-8", "backslashreplace").decode()[:200]
        yield Finding(code="E_PATH", level="reject", message=f"{shown!r}: {reason}", path=shown)


def _path_fault(path: str) -> str | None:
    try:
        encoded = path.encode("utf-8")
    except UnicodeEncodeError:
        return "not Unicode"
    if not path or path.startswith("/"):
        return "not a relative path"
    if len(encoded) > 1024:
        return "longer than 1024 bytes"
    if unicodedata.normalize("NFC", path) != path:
        return "not in Unicode's composed form (NFC)"
    if _FORBIDDEN_CHARACTERS.search(path):
        return 'holds a control character or one of \\ : * ? " < > |'
    return next((fault for part in path.split("/") if (fault := _part_fault(part))), None)


def _part_fault(part: str) -> str | None:
    if not part:
        return "has an empty part"
    if part.casefold() in _FORBIDDEN_PARTS:
        return f"{part!r} is not allowed in a path"
    if len(part.encode()) > 255:
        return "a part is longer than 255 bytes"
    if _WINDOWS_RESERVED.fullmatch(part) or part[-1] in ". ":
        return f"{part!r} cannot be a file's name on every system"
    return None


def check_names_together(sizes: Mapping[str, int]) -> Iterator[Finding]:
    """Refuse names that are one file on a system that ignores case, and files that are also folders."""
    for folded, count in Counter(name.casefold() for name in sizes).items():
        if count > 1:
            both = sorted(name for name in sizes if name.casefold() == folded)
            message = f"{' and '.join(both[:2])} differ only in case"
            yield Finding(code="E_PATH", level="reject", message=message, path=both[0])
    folders = {str(parent).casefold() for name in sizes for parent in PurePosixPath(name).parents}
    for name in sizes:
        if name.casefold() in folders:
            yield Finding(code="E_PATH", level="reject", message=f"{name} is a file and a folder", path=name)


def check_pickle(path: str, *, sample: bytes) -> Iterator[Finding]:
    """Refuse pickles, by name and by their first bytes, whatever they are called."""
    hint = "save the weights as safetensors; leave training_args.bin, optimizer.pt and the like out of the push"
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in _PICKLE_SUFFIXES:
        message = f"{path}: {suffix} files can run code when they are loaded"
        yield Finding(code="E_PICKLE", level="reject", message=message, hint=hint, path=path)
    elif kind := pickle_kind(sample):
        message = f"{path}: begins like {kind}, which can run code when it is loaded"
        yield Finding(code="E_PICKLE", level="reject", message=message, hint=hint, path=path)


def pickle_kind(sample: bytes) -> str | None:
    """Name the executable format that a file begins like."""
    if len(sample) > 1 and sample[0] == 0x80 and 2 <= sample[1] <= 5:
        return "a pickle"
    if sample.startswith(b"PK\x03\x04"):
        return "a zip archive (PyTorch's format is one)"
    if sample.startswith(b"\x93NUMPY"):
        return "a numpy file"
    if re.match(rb"c[A-Za-z_][\w.]*\n[A-Za-z_]\w*\n[(pq]|\([dl]p?\d*\n", sample):
        return "a pickle of protocol 0"
    return None


def check_code(path: str, *, sample: bytes, tokenizer_files: Choice) -> Iterator[Finding]:
    """Refuse code and archives; tell of tokenizer files and templates, which a server does not take from an adapter."""
    name = PurePosixPath(path)
    if name.suffix.lower() in _CODE_SUFFIXES or sample.startswith((b"#!", b"\x7fELF", b"MZ\x90")):
        yield Finding(
            code="E_CODE",
            level="reject",
            message=f"{path}: an adapter holds no code",
            hint="keep code in its own repository",
            path=path,
        )
    if name.suffix.lower() in _ARCHIVE_SUFFIXES:
        message = f"{path}: archives cannot be checked"
        yield Finding(code="E_CODE", level="reject", message=message, hint="push the files themselves", path=path)
    if name.name in _TOKENIZER_FILES and tokenizer_files != "off":
        message = f"{path}: servers take tokenizer and template from the base, never from an adapter"
        yield Finding(code="E_CODE", level=tokenizer_files, message=message, path=path)


def _check_file_size(path: str, *, size_bytes: int, policy: Policy) -> Iterator[Finding]:
    if size_bytes > policy.max_file_bytes:
        message = f"{path}: {size_bytes:,} bytes are over the limit of {policy.max_file_bytes:,}"
        yield Finding(code="E_SIZE", level="reject", message=message, path=path)


def check_sizes(sizes: Mapping[str, int], policy: Policy) -> Iterator[Finding]:
    """Refuse trees of too many files or bytes."""
    if len(sizes) > policy.max_files:
        message = f"{len(sizes):,} files are over the limit of {policy.max_files:,}"
        yield Finding(code="E_SIZE", level="reject", message=message)
    if (total := sum(sizes.values())) > policy.max_tree_bytes:
        message = f"{total:,} bytes are over the limit of {policy.max_tree_bytes:,}"
        yield Finding(code="E_SIZE", level="reject", message=message)
    for path, size_bytes in sizes.items():
        yield from _check_file_size(path, size_bytes=size_bytes, policy=policy)
