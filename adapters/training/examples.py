"""Turns rows into token ids and marks which tokens are learned. Knows no model and no optimizer.

The marks come from rendering a conversation up to and including each answer and taking the difference, so any chat
template that only appends works; no list of known templates is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loractl.adapters.errors import BadData, BadRow
from loractl.adapters.training.rows import Row

_DEFAULT_TEMPLATE = "{text} {label}"


@dataclass(frozen=True, slots=True)
class Example:
    """One row in tokens: `ids`, and for each whether it is learned (predicted from those before it)."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]

    @property
    def num_learned(self) -> int:
        return sum(self.learned)


@dataclass(frozen=True, slots=True)
class Prepared:
    """All examples of a file, and how many rows were left out because they are longer than allowed."""

    examples: list[Example]
    num_overlong: int


def prepare_examples(rows: Sequence[Row], tokenizer: Any, *, template: str | None, max_tokens: int) -> Prepared:
    """Tokenize rows; raises BadRow where nothing would be learned, BadData where every row is too long."""
    if tokenizer.eos_token_id is None:
        raise BadData("this base's tokenizer has no end-of-text token, so an answer could never end")
    if rows and rows[0].form == "messages" and not tokenizer.chat_template:
        raise BadData(
            "the rows are conversations, but this base has no chat template", hint="use prompt and completion"
        )
    examples = [_example(row, tokenizer, template or _DEFAULT_TEMPLATE) for row in rows]
    fitting = [example for example in examples if len(example.ids) <= max_tokens]
    if not fitting:
        raise BadData(f"every row is longer than data.max_tokens={max_tokens}", hint="raise data.max_tokens")
    return Prepared(fitting, len(examples) - len(fitting))


def _example(row: Row, tokenizer: Any, template: str) -> Example:
    if row.form == "messages":
        text, spans = _render_messages(row, tokenizer)
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        end: list[int] = []
    else:
        if row.form == "text+label":
            before, _, _ = template.partition("{label}")
            prompt = before.rstrip().replace("{text}", row.fields["text"])
            answer = before[len(before.rstrip()) :] + row.fields["label"]
        else:
            prompt, answer = row.fields["prompt"], row.fields["completion"]
        text, spans = prompt + answer, [(len(prompt), len(prompt) + len(answer))]
        encoded = tokenizer(text, return_offsets_mapping=True)
        end = [tokenizer.eos_token_id]
    learned = [
        any(start < stop and first <= start < last for first, last in spans)
        for start, stop in encoded["offset_mapping"]
    ]
    example = Example(tuple(encoded["input_ids"] + end), tuple(learned + [True] * len(end)))
    if not any(example.learned[1:]):
        raise BadRow(f"{row.place}: no token would be learned from this row")
    return example


def _render_messages(row: Row, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    messages = row.fields["messages"]
    whole = _render(tokenizer, messages, prompt=False)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:number], prompt=True)
        through = _render(tokenizer, messages[: number + 1], prompt=False)
        if not (through.startswith(before) and whole.startswith(through)):
            raise BadRow(
                f"{row.place}: this base's chat template rewrites earlier messages: answers cannot be told apart",
                hint="split the conversation so that each row ends with its only answer",
            )
        spans.append((len(before), _end_of_answer(through, len(before), tokenizer.eos_token)))
    return whole, spans


def _render(tokenizer: Any, messages: Sequence[Any], *, prompt: bool) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))


def _end_of_answer(text: str, start: int, stop: str) -> int:
    """Where learning ends: after the stop token, before the line break that some templates put behind it."""
    found = text.find(stop, start)
    return found + len(stop) if found >= 0 else len(text)
