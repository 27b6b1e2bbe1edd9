"""Reads files, folders of files and hub datasets into records that know their place. Knows no columns and no tokens."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loractl.adapters.errors import BadData, BadRow, NotFound, UsageError
from loractl.adapters.hub_download import fetch_snapshot

HUB_PREFIX = "hf:"
_TRAIN_NAME = re.compile(r"(^|[/_.-])train([/_.-]|$)")
_SHOWN_CHARS = 100


@dataclass(frozen=True, slots=True)
class Record:
    """One value of a data file; `place` is `file:line`, `line` its text where the file is made of lines."""

    place: str
    value: Any
    line: str = ""

    def at(self, key: str) -> str:
        """The place of a key of this record, with its column where that is known."""
        column = self.line.find(json.dumps(key)) if self.line else -1
        return f"{self.place}:{column + 1}" if column >= 0 else self.place

    def shown(self) -> str:
        """The record for people, shortened to one line."""
        text = self.line.strip() or json.dumps(self.value, ensure_ascii=False, default=str)
        return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."


def data_files(name: str) -> list[Path]:
    """Find the files that a path, a folder or `hf:ORG/NAME[@REVISION]` stands for.

    Of a folder or a hub dataset with files named after splits, those of `train` count.
    Raises NotFound, BadData, NotAllowed or Unreachable.
    """
    path = _fetch_dataset(name) if name.startswith(HUB_PREFIX) else Path(name)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise NotFound(f"no such data file: {path}", hint=f"a hub dataset is written {HUB_PREFIX}ORG/NAME")
    found = sorted(
        one
        for one in path.rglob("*")
        if one.suffix.lower() in _READERS and not any(part.startswith(".") for part in one.relative_to(path).parts)
    )
    if path.is_dir() and not found:
        raise BadData(f"{name}: holds no data file", hint=_known_suffixes())
    of_train = [one for one in found if _TRAIN_NAME.search(str(one.relative_to(path)))]
    return of_train or found


def public_name(name: str) -> str:
    """What a record may say about where data came from: a file's name without folders, or the hub dataset."""
    return name if name.startswith(HUB_PREFIX) else Path(name).name


def read_records(path: Path) -> Iterator[Record]:
    """Read one file; raises BadRow with file:line:column, or BadData for the whole file."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise BadData(f"{path}: cannot read {path.suffix or 'a file without a suffix'}", hint=_known_suffixes())
    yield from reader(path)


def _known_suffixes() -> str:
    return "files are " + ", ".join(_READERS)


def _fetch_dataset(name: str) -> Path:
    repo_id, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
    return fetch_snapshot(
        repo_id,
        typed=name,
        kind="dataset",
        revision=revision or None,
        wanted=[f"*{suffix}" for suffix in _READERS],
        instead=f"give a file or a folder, or {HUB_PREFIX}ORG/NAME[@REVISION]",
    )


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadData(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        before = path.read_bytes()[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise BadRow(
            f"{path}:{line}:{column}: not UTF-8 (byte {error.object[error.start]:#04x})",
            hint="save the file as UTF-8",
        ) from error


def _read_jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_text_of(path).split("\n"), 1):
        if line.strip():
            try:
                yield Record(f"{path}:{number}", json.loads(line), line)
            except json.JSONDecodeError as error:
                raise BadRow(
                    f"{path}:{number}:{error.colno}: not JSON: {error.msg}", hint=_around(line, error.colno - 1)
                ) from error


def _read_json(path: Path) -> Iterator[Record]:
    """An array of rows, or objects one after the other, as JSON lines under another name."""
    text = _text_of(path)
    decoder, position, line_at, line = json.JSONDecoder(), 0, 0, 1
    is_array = text.lstrip().startswith("[")
    if is_array:
        position = text.index("[") + 1
    while True:
        while position < len(text) and (text[position].isspace() or (is_array and text[position] == ",")):
            position += 1
        if position >= len(text) or (is_array and text[position] == "]"):
            return
        line, line_at = line + text.count("\n", line_at, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise BadRow(
                f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}", hint=_around(text, error.pos)
            ) from error
        yield Record(f"{path}:{line}", value)


def _around(text: str, position: int) -> str:
    """Show where a text breaks off being JSON."""
    start = max(0, position - 30)
    return f"near `{text[start : position + 20].strip()}`"


def _read_csv(path: Path, *, delimiter: str = ",") -> Iterator[Record]:
    reader = csv.DictReader(io.StringIO(_text_of(path), newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            values = [value for value in row.values() if isinstance(value, str)]
            line = reader.line_num - sum(value.count("\n") for value in values)
            if None in row or None in row.values():
                raise BadRow(
                    f"{path}:{line}: not the {len(reader.fieldnames or [])} columns of the header",
                    hint='a value that holds the delimiter or a line break stands in "quotes"',
                )
            yield Record(f"{path}:{line}", row)
    except csv.Error as error:
        raise BadRow(f"{path}:{reader.line_num}: {error}") from error


def _read_tsv(path: Path) -> Iterator[Record]:
    return _read_csv(path, delimiter="\t")


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f"{path}: parquet needs the package pyarrow", hint="pip install 'loractl[parquet]'") from error
    try:
        rows: Sequence[Mapping[str, Any]] = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise BadData(f"{path}: not parquet: {str(error).splitlines()[0]}") from error
    for number, row in enumerate(rows, 1):
        yield Record(f"{path}:{number}", row)


_READERS: Mapping[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
