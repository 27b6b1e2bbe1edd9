"""Tells what form training rows have, and file, line and reason of the first one that is broken. Knows no tokens."""

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loractl.adapters.errors import BadData, BadRow
from loractl.adapters.training.conversations import (
    BadConversation,
    checked_messages,
    checked_tools,
    messages_of_turns,
)
from loractl.adapters.training.data_files import Record, data_files, read_records
from loractl.adapters.training.pairs import ANSWERS, checked_pair

# A form is named after its columns where they are the person's own, as in a template of {question} and {answer}.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "preference": ANSWERS,
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "choices": ("prompt", "choices", "answer"),
    "prompt+completion": ("prompt", "completion"),
    "text+label": ("text", "label"),
    "text": ("text",),
}
_OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "preference": ("prompt", "tools"),
    "messages": ("tools",),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system"),
}
_CONVERSATION_KEYS = ("conversation_id", "conversation")


@dataclass(frozen=True, slots=True)
class Row:
    """One row in a known form; `place` is `file:line` for messages to people.

    `fields` are `messages` (and `tools`), `prompt` and `completion`, `text`, Alpaca's own, a template's columns, or
    `prompt`, `chosen` and `rejected`, all texts or all messages.
    `conversation` is equal for rows that must stay together when some are held out.
    """

    place: str
    form: str
    fields: Mapping[str, Any]
    conversation: str = ""


def read_rows(path: Path, *, columns: Sequence[str] = ()) -> list[Row]:
    """Read one data file; `columns` are those of a template. Raises BadRow with file:line, or BadData."""
    return _checked_rows(read_records(path), columns, where=str(path))


def read_all_rows(names: Sequence[str], *, columns: Sequence[str] = ()) -> list[Row]:
    """Read files, folders and hub datasets together; they must be of one form."""
    files = [path for name in names for path in data_files(name)]
    records = (record for path in files for record in read_records(path))
    return _checked_rows(records, columns, where=", ".join(names))


def rows_digest(rows: Sequence[Row]) -> str:
    """Hash the rows' contents, whatever their order."""
    digests = sorted(row_digest(row) for row in rows)
    return "sha256:" + hashlib.sha256(b"".join(digests)).hexdigest()


def row_digest(row: Row) -> bytes:
    """Hash one row's contents."""
    return hashlib.sha256(json.dumps(row.fields, sort_keys=True, ensure_ascii=False).encode()).digest()


def _checked_rows(records: Iterable[Record], columns: Sequence[str], *, where: str) -> list[Row]:
    forms = {"+".join(columns): tuple(columns)} if columns else _NEEDED
    rows: list[Row] = []
    for record in records:
        rows.append(_checked(record, forms, began_with=rows[0].form if rows else None))
    if not rows:
        raise BadData(f"{where}: holds no rows")
    return rows


def _checked(record: Record, forms: Mapping[str, tuple[str, ...]], *, began_with: str | None) -> Row:
    value = record.value
    if not isinstance(value, dict):
        raise BadRow(
            f"{record.place}: a row is an object, not {type(value).__name__}", hint=f"the row: {record.shown()}"
        )
    form = began_with
    if form is None or not _has(value, forms[form]):
        form = next((name for name, needed in forms.items() if _has(value, needed)), None)
        if form is None or (began_with and set(forms[form]) < set(forms[began_with])):
            raise _columns_missing(record, {began_with: forms[began_with]} if began_with else forms)
        if began_with:
            raise BadRow(f"{record.place}: is {form}, but the data began with {began_with}", hint=record.shown())
    if form == "text" and "text" in forms and difflib.get_close_matches("label", list(value), n=1):
        raise _columns_missing(record, {"text+label": forms["text+label"]})  # a misspelt label is no plain text
    fields = {name: value[name] for name in forms[form]}
    fields |= {name: value[name] for name in _OPTIONAL.get(form, ()) if value.get(name)}
    if form in {"messages", "sharegpt", "preference"}:
        try:
            fields = checked_pair(fields) if form == "preference" else _conversation(fields)
        except BadConversation as error:
            raise BadRow(
                f"{record.at(error.key)}: {error.message}", hint=error.hint or f"the row: {record.shown()}"
            ) from error
    else:
        if form == "choices":
            fields = _chosen(record, fields)
        _check_texts(record, fields)
    named = next((str(value[key]) for key in _CONVERSATION_KEYS if value.get(key) is not None), None)
    return Row(record.place, form, fields, named or _beginning(fields))


def _has(value: Mapping[str, Any], needed: Sequence[str]) -> bool:
    return all(value.get(name) is not None for name in needed)


def _columns_missing(record: Record, forms: Mapping[str, tuple[str, ...]]) -> BadRow:
    """Name the column that the row lacks of the form it is nearest to, or all that there could be."""
    value: Mapping[str, Any] = record.value
    if "preference" in forms and any(name in value for name in ANSWERS):
        forms = {"preference": ANSWERS}
    keys = [key for key in value if isinstance(key, str)]
    for needed in sorted(forms.values(), key=lambda needed: -sum(name in value for name in needed)):
        for name in needed:
            if name in value and value[name] is None:
                return BadRow(f"{record.at(name)}: {name} is null", hint=f"the row: {record.shown()}")
            wrong = difflib.get_close_matches(name, [key for key in keys if key not in needed], n=1)
            if name not in value and wrong:
                meant = f"`{name}`" if needed in _NEEDED.values() else f"{{{wrong[0]}}} in the template"
                return BadRow(
                    f"{record.at(wrong[0])}: no column `{name}`, but `{wrong[0]}`", hint=f"did you mean {meant}?"
                )
    known = "; or ".join(" and ".join(needed) for needed in forms.values())
    return BadRow(f"{record.place}: has {', '.join(map(repr, value)) or 'no columns'}", hint=f"columns: {known}")


def _conversation(fields: Mapping[str, Any]) -> dict[str, Any]:
    messages = (
        checked_messages(fields["messages"]) if "messages" in fields else messages_of_turns(fields["conversations"])
    )
    if isinstance(fields.get("system"), str) and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": fields["system"]}, *messages]
    tools = checked_tools(fields["tools"], messages) if fields.get("tools") else []
    return {"messages": messages} | ({"tools": tools} if tools else {})


def _chosen(record: Record, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the number of the right choice, or its text, into a completion; the choices stay for scoring."""
    choices, answer = fields["choices"], fields["answer"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise BadRow(f"{record.at('choices')}: choices is not a list of texts", hint=f"the row: {record.shown()}")
    if isinstance(answer, int) and 0 <= answer < len(choices):
        answer = choices[answer]
    if answer not in choices:
        raise BadRow(
            f"{record.at('answer')}: answer {answer!r} is no choice",
            hint=f"its number from 0 to {len(choices) - 1}, or its text",
        )
    return {"prompt": fields["prompt"], "completion": answer, "choices": choices}


def _check_texts(record: Record, fields: Mapping[str, Any]) -> None:
    for name, text in fields.items():
        if name == "choices":
            continue
        if not isinstance(text, str):
            raise BadRow(
                f"{record.at(name)}: {name} is {type(text).__name__}, not text", hint=f"the row: {record.shown()}"
            )
        if not text.strip():
            raise BadRow(f"{record.at(name)}: {name} is empty", hint=f"the row: {record.shown()}")


def _beginning(fields: Mapping[str, Any]) -> str:
    """How a row begins: rows of one conversation, each a turn longer, begin alike."""
    messages = fields.get("messages") or (fields.get("prompt") if isinstance(fields.get("prompt"), list) else None)
    if messages:
        first = next((one["content"] for one in messages if one["role"] == "user"), "")
        system = next((one["content"] for one in messages if one["role"] == "system"), "")
        return f"{system}\n{first}"
    return str(fields.get("prompt") or fields.get("text") or f"{fields.get('instruction')}\n{fields.get('input')}")
