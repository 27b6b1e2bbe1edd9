"""Reads training files into rows, and says file, line and reason of the first one that is broken. Knows no tokens."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loractl.adapters.errors import BadData, BadRow

Form = Literal["text+label", "prompt+completion", "messages"]

_FIELDS: Mapping[Form, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt+completion": ("prompt", "completion"),
    "text+label": ("text", "label"),
}
_ROLES = {"system", "user", "assistant", "tool"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in its file; `place` is `file:line` for messages to people."""

    place: str
    form: Form
    fields: Mapping[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Read a .jsonl, .json, .csv or .tsv file; raises BadRow with file:line, or BadData for the whole file."""
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_tsv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise BadData(f"{path}: cannot read {path.suffix or 'a file without a suffix'}", hint="jsonl, json, csv or tsv")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadData(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise BadRow(f"{path}:{line}: not UTF-8 (byte {error.object[error.start]:#04x})") from error
    rows = [_checked(f"{path}:{line}", value) for line, value in reader(path, text)]
    if not rows:
        raise BadData(f"{path}: holds no rows")
    forms = {row.form for row in rows}
    if len(forms) > 1:
        odd = next(row for row in rows if row.form != rows[0].form)
        raise BadRow(f"{odd.place}: is {odd.form}, but the file began with {rows[0].form}")
    return rows


def rows_digest(rows: list[Row]) -> str:
    """Hash the rows' contents, whatever their order."""
    digests = sorted(hashlib.sha256(_canonical(row)).digest() for row in rows)
    return "sha256:" + hashlib.sha256(b"".join(digests)).hexdigest()


def _canonical(row: Row) -> bytes:
    return json.dumps(row.fields, sort_keys=True, ensure_ascii=False).encode()


def _read_jsonl(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise BadRow(f"{path}:{number}:{error.colno}: not JSON: {error.msg}") from error


def _read_json(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from error
    if not isinstance(value, list):
        raise BadData(f"{path}: a .json file of rows holds an array", hint="one object per line is a .jsonl file")
    yield from enumerate(value, 1)


def _read_csv(path: Path, text: str, *, delimiter: str = ",") -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise BadRow(f"{path}:{reader.line_num}: not the {len(reader.fieldnames or [])} columns of the header")
            yield reader.line_num, row
    except csv.Error as error:
        raise BadRow(f"{path}:{reader.line_num}: {error}") from error


def _read_tsv(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    return _read_csv(path, text, delimiter="\t")


def _checked(place: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise BadRow(f"{place}: a row is an object, not {type(value).__name__}")
    for form, names in _FIELDS.items():
        if all(name in value for name in names):
            fields = {name: value[name] for name in names}
            if form == "messages":
                _check_messages(place, fields["messages"])
            else:
                _check_texts(place, fields)
            return Row(place, form, fields)
    raise BadRow(
        f"{place}: has {', '.join(map(repr, value)) or 'no columns'}",
        hint="columns: text and label; or prompt and completion; or messages",
    )


def _check_texts(place: str, fields: dict[str, Any]) -> None:
    for name, text in fields.items():
        if not isinstance(text, str):
            raise BadRow(f"{place}: {name} is {type(text).__name__}, not text")
        if not text.strip():
            raise BadRow(f"{place}: {name} is empty")


def _check_messages(place: str, messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"{place}: messages is not a list of messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise BadRow(f"{place}: messages[{number}] has no role of {', '.join(sorted(_ROLES))}")
        if not isinstance(message.get("content"), str):
            raise BadRow(f"{place}: messages[{number}].content is not text")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow(f"{place}: no assistant message, so nothing to learn")
