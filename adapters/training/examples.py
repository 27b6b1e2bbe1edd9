"""Turns rows into token ids and marks which tokens are learned. Knows no model and no optimizer.

The marks come from rendering a conversation up to and including each answer and taking the difference, so any chat
template that only appends works; no list of known templates is needed. The last answer always ends in a stop token.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loractl.adapters.errors import BadData, BadRow
from loractl.adapters.training.recipe import DataPart
from loractl.adapters.training.rows import Row

_DEFAULT_TEMPLATE = "{text} {label}"
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
# Of rows that are too long so many may be dropped without being asked.
_FEW_OVERLONG = 0.01
# Stanford Alpaca's own words, for bases that have no chat template.
_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
_ALPACA_INPUT = ", paired with an input that provides further context"


@dataclass(frozen=True, slots=True)
class Example:
    """One row in tokens: `ids`, and for each whether it is learned (predicted from those before it)."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]
    rejected: "Example | None" = None
    """The answer to the same prompt that this one is preferred to, where the row is a pair."""

    @property
    def sequences(self) -> tuple["Example", ...]:
        """What goes through the model for this row."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def num_learned(self) -> int:
        return sum(sum(one.learned) for one in self.sequences)

    @property
    def num_tokens(self) -> int:
        return sum(len(one.ids) for one in self.sequences)

    @property
    def longest(self) -> int:
        return max(len(one.ids) for one in self.sequences)


@dataclass(frozen=True, slots=True)
class Prepared:
    """The examples that are left with their rows, and what was lost because rows are longer than allowed."""

    examples: list[Example]
    rows: list[Row]
    num_overlong: int
    """Rows above the limit, dropped or cut."""
    num_tokens_lost: int
    longest: int
    """Tokens of the longest row as it came."""


def template_columns(template: str | None) -> list[str]:
    """List the columns that a template names, each once."""
    return list(dict.fromkeys(_PLACEHOLDER.findall(template or "")))


def prepare_examples(rows: Sequence[Row], tokenizer: Any, data: DataPart, *, max_tokens: int) -> Prepared:
    """Tokenize rows and apply `data.overlong`; raises BadRow where nothing would be learned, BadData for all rows."""
    if tokenizer.eos_token_id is None:
        raise BadData("this base's tokenizer has no end-of-text token, so an answer could never end")
    if rows and _is_conversation(rows[0]) and not tokenizer.chat_template:
        raise BadData(
            "the rows are conversations, but this base has no chat template", hint="use prompt and completion"
        )
    kept: list[tuple[Example, Row]] = []
    overlong: list[tuple[Example, Row]] = []
    for row in rows:
        example = make_example(row, tokenizer, data)
        (kept if example.longest <= max_tokens else overlong).append((example, row))
    _check_overlong(overlong, len(rows), data, max_tokens=max_tokens)
    num_lost = sum(example.num_tokens for example, _ in overlong)
    if data.overlong == "truncate":
        cut = [(short, row) for example, row in overlong if (short := _cut(example, max_tokens)) is not None]
        kept += cut
        num_lost -= sum(example.num_tokens for example, _ in cut)
    if not kept:
        raise BadData(f"every row is longer than data.max_tokens={max_tokens}", hint="raise data.max_tokens")
    longest = max(example.longest for example, _ in [*kept, *overlong])
    return Prepared([one for one, _ in kept], [row for _, row in kept], len(overlong), num_lost, longest)


def _is_conversation(row: Row) -> bool:
    return "messages" in row.fields or isinstance(row.fields.get("prompt"), list)


def _cut(example: Example, max_tokens: int) -> Example | None:
    """Cut the end off; None where nothing that is learned would be left, or two answers would be one."""
    if not all(any(one.learned[1:max_tokens]) for one in example.sequences):
        return None
    rejected = _cut(example.rejected, max_tokens) if example.rejected else None
    short = Example(example.ids[:max_tokens], example.learned[:max_tokens], rejected)
    return None if rejected and rejected.ids == short.ids else short


def _check_overlong(overlong: Sequence[tuple[Example, Row]], num_rows: int, data: DataPart, *, max_tokens: int) -> None:
    allowed = _FEW_OVERLONG * num_rows if data.overlong == "auto" else 0
    if data.overlong in {"auto", "error"} and len(overlong) > allowed:
        example, row = max(overlong, key=lambda one: one[0].longest)
        raise BadData(
            f"{len(overlong)} of {num_rows} rows are longer than {max_tokens} tokens; the longest, {row.place}, "
            f"has {example.longest}",
            hint=f"--set data.max_tokens={example.longest} takes all; --set data.overlong=drop leaves them out; "
            "data.overlong=truncate cuts their ends",
        )


def make_example(row: Row, tokenizer: Any, data: DataPart) -> Example:
    """Tokenize one row; raises BadRow where nothing would be learned."""
    fields = row.fields
    if row.form == "preference":
        rejected, chosen = (_answer_example(row, name, tokenizer, data) for name in ("rejected", "chosen"))
        return Example(chosen.ids, chosen.learned, rejected)
    if row.form == "alpaca" and tokenizer.chat_template:
        ids, learned = _chat_tokens(row.place, {"messages": _alpaca_messages(fields)}, tokenizer, data)
    elif "messages" in fields:
        ids, learned = _chat_tokens(row.place, fields, tokenizer, data)
    else:
        ids, learned = _text_tokens(*_prompt_and_answer(row, data.template), tokenizer)
    return _checked_example(row.place, ids, learned)


def _answer_example(row: Row, name: str, tokenizer: Any, data: DataPart) -> Example:
    """One answer of a pair after the prompt, whose own answers are not learned."""
    prompt, answer = row.fields["prompt"], row.fields[name]
    if isinstance(answer, str):
        return _checked_example(row.place, *_text_tokens(prompt, answer, tokenizer))
    messages = [*({**message, "weight": 0} for message in prompt), *answer]
    fields = {"messages": messages, "tools": row.fields.get("tools")}
    return _checked_example(row.place, *_chat_tokens(row.place, fields, tokenizer, data))


def _checked_example(place: str, ids: list[int], learned: list[bool]) -> Example:
    learned[0] = False  # nothing comes before it
    if not any(learned):
        raise BadRow(f"{place}: no token would be learned from this row")
    return Example(tuple(ids), tuple(learned))


def marked_text(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """Return an example's text in pieces, each learned or not, special tokens written out."""
    pieces: list[tuple[str, bool]] = []
    for learned, group in itertools.groupby(zip(example.ids, example.learned, strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group], skip_special_tokens=False)
        pieces.append((str(text), learned))
    if example.rejected is not None:
        answer = itertools.dropwhile(lambda piece: not piece[1], marked_text(example.rejected, tokenizer))
        pieces += [("\nand not: ", False), *answer]
    return pieces


def _prompt_and_answer(row: Row, template: str | None) -> tuple[str, str]:
    fields = row.fields
    if "completion" in fields and template is None:
        return fields["prompt"], fields["completion"]
    if row.form == "alpaca":
        given = fields.get("input")
        head = fields.get("system") or _ALPACA.format(_ALPACA_INPUT if given else "")
        middle = f"### Instruction:\n{fields['instruction']}\n\n" + (f"### Input:\n{given}\n\n" if given else "")
        return head + middle + "### Response:\n", fields["output"]
    if row.form == "text":
        return "", fields["text"]
    # The last column is the answer; a space before it belongs to its first token, as it does when it is generated.
    whole = template or _DEFAULT_TEMPLATE
    last = whole.rindex("{")
    before = whole[:last]
    head = _PLACEHOLDER.sub(lambda match: fields[match[1]], before.rstrip())
    return head, before[len(before.rstrip()) :] + fields[whole[last + 1 : -1]]


def _text_tokens(prompt: str, answer: str, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Tokenize a prompt as the server will, and what follows it.

    Where tokens of the whole text straddle the border, the prompt's own tokens count: they are what is served.
    """
    stop = tokenizer.eos_token_id
    before = _without_end(list(tokenizer(prompt)["input_ids"]) if prompt else [], stop)
    whole = _without_end(list(tokenizer(prompt + answer)["input_ids"]), stop)
    if whole[: len(before)] != before or len(whole) == len(before):
        whole = before + list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    learned = [False] * len(before) + [True] * (len(whole) - len(before))
    return [*whole, stop], [*learned, True]


def _without_end(ids: list[int], stop: int) -> list[int]:
    """Some tokenizers end every text themselves."""
    return ids[:-1] if ids and ids[-1] == stop else ids


def _alpaca_messages(fields: Any) -> list[dict[str, str]]:
    asked = fields["instruction"] + (f"\n\n{fields['input']}" if fields.get("input") else "")
    system = [{"role": "system", "content": fields["system"]}] if fields.get("system") else []
    return [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": fields["output"]}]


def _chat_tokens(place: str, fields: Any, tokenizer: Any, data: DataPart) -> tuple[list[int], list[bool]]:
    text, spans = _render_messages(place, fields, tokenizer, only_last=data.answers == "last")
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    learned = [
        any(start < stop and first <= start < last for first, last in spans)
        for start, stop in encoded["offset_mapping"]
    ]
    ids: list[int] = list(encoded["input_ids"])
    if learned and learned[-1] and ids[-1] != tokenizer.eos_token_id:
        return [*ids, tokenizer.eos_token_id], [*learned, True]  # a template that ends answers in some other way
    return ids, learned


def _render_messages(place: str, fields: Any, tokenizer: Any, *, only_last: bool) -> tuple[str, list[tuple[int, int]]]:
    """Return the whole conversation as text, and where its learned answers are."""
    messages, tools = fields["messages"], fields.get("tools")
    whole = _render(tokenizer, messages, tools, prompt=False)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if only_last:
        answers = answers[-1:]
    spans = []
    for number in answers:
        if messages[number].get("weight") == 0:
            continue
        before = _render(tokenizer, messages[:number], tools, prompt=True)
        through = _render(tokenizer, messages[: number + 1], tools, prompt=False)
        if not (through.startswith(before) and whole.startswith(through)):
            raise BadRow(
                f"{place}: this base's chat template rewrites earlier messages: answers cannot be told apart",
                hint="--set data.answers=last learns the last answer of each row alone; or split the conversation",
            )
        spans.append((len(before), _end_of_answer(through, len(before), tokenizer.eos_token)))
    return whole, spans


def _render(tokenizer: Any, messages: Sequence[Any], tools: Any, *, prompt: bool) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt))


def _end_of_answer(text: str, start: int, stop: str) -> int:
    """Where learning ends: after the stop token, before the line break that some templates put behind it."""
    found = text.rfind(stop, start)
    return found + len(stop) if found >= 0 else len(text)
