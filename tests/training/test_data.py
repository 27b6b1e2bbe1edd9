"""Data of every form: read, detected, learned as the base's template renders it; wrong rows named to the column."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from loractl.adapters.errors import BadData, BadRow, LoractlError
from loractl.adapters.training.data_files import data_files
from loractl.adapters.training.examples import make_example, marked_text, prepare_examples, template_columns
from loractl.adapters.training.recipe import DataPart
from loractl.adapters.training.rows import read_all_rows, read_rows
from loractl.adapters.training.splitting import split_rows
from tiny_models import make_tiny_base
from tool_base import CALL, QUESTION, TEMPLATE, WEATHER


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(make_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-base"))


def _jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _learned(row: Any, tokenizer: Any, **settings: Any) -> str:
    example = make_example(row, tokenizer, DataPart(**settings))
    return "|".join(text for text, learned in marked_text(example, tokenizer) if learned)


def _as_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_one_table_in_five_formats_is_the_same_rows(tmp_path: Path) -> None:
    rows = [{"text": 'a "quick", fox', "label": "yes"}, {"text": "two\nlines", "label": "no"}]
    quoted = 'text,label\n"a ""quick"", fox",yes\n"two\nlines",no\n'
    (tmp_path / "a.csv").write_text(quoted)
    (tmp_path / "a.tsv").write_text('text\tlabel\n"a ""quick"", fox"\tyes\n"two\nlines"\tno\n')
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    _jsonl(tmp_path / "a.jsonl", rows)
    _as_parquet(tmp_path / "a.parquet", rows)
    for name in ("a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet"):
        read = read_rows(tmp_path / name)
        assert [row.fields for row in read] == rows, name
        assert {row.form for row in read} == {"text+label"}
    assert [row.place for row in read_rows(tmp_path / "a.csv")] == [f"{tmp_path}/a.csv:2", f"{tmp_path}/a.csv:3"]
    assert read_rows(tmp_path / "a.json")[1].place == f"{tmp_path}/a.json:6"


@pytest.mark.parametrize(
    ("row", "form", "learned"),
    [
        ({"text": "the fox"}, "text", "he fox<|im_end|>"),
        ({"text": "the fox", "label": "yes"}, "text+label", " yes<|im_end|>"),
        ({"prompt": "the fox", "completion": " jumps"}, "prompt+completion", " jumps<|im_end|>"),
        ({"instruction": "say", "input": "fox", "output": "fox"}, "alpaca", "fox<|im_end|>"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "sharegpt",
            "b<|im_end|>",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "messages",
            "b<|im_end|>",
        ),
    ],
)
def test_form_is_detected_and_only_the_answer_is_learned(
    tmp_path: Path, tokenizer: Any, row: dict[str, Any], form: str, learned: str
) -> None:
    (read,) = read_rows(_jsonl(tmp_path / "a.jsonl", [row]))
    assert read.form == form
    assert _learned(read, tokenizer) == learned or form == "text"
    assert _learned(read, tokenizer).endswith("<|im_end|>")


def test_template_may_name_any_columns(tmp_path: Path, tokenizer: Any) -> None:
    template = "Q: {question} A: {answer}"
    path = _jsonl(tmp_path / "a.jsonl", [{"question": "two?", "answer": "2", "id": 7}])
    (row,) = read_rows(path, columns=template_columns(template))
    example = make_example(row, tokenizer, DataPart(template=template))
    assert tokenizer.decode(example.ids) == "Q: two? A: 2<|im_end|>"
    assert _learned(row, tokenizer, template=template) == " 2<|im_end|>"


def test_alpaca_without_a_chat_template_is_alpacas_own_prompt(tmp_path: Path, tokenizer: Any) -> None:
    (row,) = read_rows(_jsonl(tmp_path / "a.jsonl", [{"instruction": "Say it.", "input": "", "output": "it"}]))
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        example = make_example(row, tokenizer, DataPart())
    finally:
        tokenizer.chat_template = template
    text = tokenizer.decode(example.ids)
    assert text.endswith("### Instruction:\nSay it.\n\n### Response:\nit<|im_end|>")


@pytest.mark.parametrize("arguments", [{"city": "Bern", "days": None}, '{"city": "Bern"}'])
@pytest.mark.parametrize("as_text", [True, False])
def test_tool_calls_are_learned_as_the_server_reads_them_and_results_are_not(
    tmp_path: Path, tokenizer: Any, arguments: Any, as_text: bool
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "assistant", "content": "Sun."},
    ]
    tools: Any = [WEATHER | {"strict": None}]
    row = {"messages": messages, "tools": json.dumps(tools) if as_text else tools}
    (read,) = read_rows(_jsonl(tmp_path / "a.jsonl", [row]))
    template, tokenizer.chat_template = tokenizer.chat_template, TEMPLATE
    try:
        learned = _learned(read, tokenizer)
        expected = tokenizer.apply_chat_template(QUESTION, tools=[WEATHER], tokenize=False, add_generation_prompt=True)
        text = tokenizer.decode(make_example(read, tokenizer, DataPart()).ids)
    finally:
        tokenizer.chat_template = template
    assert learned == f"{CALL}<|im_end|>|Sun.<|im_end|>"
    assert text.startswith(expected)


def test_template_that_rewrites_history_is_named_and_the_last_answer_can_still_be_learned(
    tmp_path: Path, tokenizer: Any
) -> None:
    messages = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user", "assistant")]
    (row,) = read_rows(_jsonl(tmp_path / "a.jsonl", [{"messages": messages}]))
    kept = tokenizer.chat_template
    # Like Qwen3's: thoughts stand in the last answer alone.
    tokenizer.chat_template = kept.replace(
        "{{ message['content'] }}",
        "{% if message.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ message['content'] }}",
    )
    try:
        with pytest.raises(BadRow, match="rewrites earlier messages") as caught:
            _learned(row, tokenizer)
        assert "data.answers=last" in (caught.value.hint or "")
        assert _learned(row, tokenizer, answers="last") == "<think></think>a<|im_end|>"
    finally:
        tokenizer.chat_template = kept


def test_prompt_is_tokenized_as_it_will_be_served(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "Label: ", "completion": "negative"}, {"prompt": "the qui", "completion": "ck brown fox"}]
    for row, given in zip(read_rows(_jsonl(tmp_path / "a.jsonl", rows)), rows, strict=True):
        example = make_example(row, tokenizer, DataPart())
        served = tokenizer(given["prompt"])["input_ids"]
        assert list(example.ids[: len(served)]) == served
        assert not any(example.learned[: len(served)])
        assert tokenizer.decode(example.ids) == given["prompt"] + given["completion"] + "<|im_end|>"


def test_overlong_rows_follow_the_policy_and_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 3 + [{"prompt": "a", "completion": "x" * 50}]
    read = read_rows(_jsonl(tmp_path / "a.jsonl", rows))
    with pytest.raises(BadData, match=r"1 of 4 rows are longer than 10 tokens; the longest, .*a\.jsonl:4"):
        prepare_examples(read, tokenizer, DataPart(), max_tokens=10)
    whole = len(make_example(read[3], tokenizer, DataPart()).ids)
    dropped = prepare_examples(read, tokenizer, DataPart(overlong="drop"), max_tokens=10)
    assert (len(dropped.examples), dropped.num_overlong, dropped.num_tokens_lost) == (3, 1, whole)
    cut = prepare_examples(read, tokenizer, DataPart(overlong="truncate"), max_tokens=10)
    assert (len(cut.examples), cut.num_overlong, cut.num_tokens_lost) == (4, 1, whole - 10)


def test_split_keeps_conversations_together(tmp_path: Path) -> None:
    chooser = random.Random(1)
    rows = []
    for talk in range(40):
        for turns in range(1, chooser.randint(2, 5)):
            messages = [
                {"role": role, "content": f"{talk}.{turn}"} for turn in range(turns) for role in ("user", "assistant")
            ]
            rows.append({"messages": messages})
    read = read_rows(_jsonl(tmp_path / "a.jsonl", rows))
    train, held_out = split_rows(read, share=0.2, seed=0)
    assert sorted(train + held_out) == list(range(len(rows)))
    assert not {read[number].conversation for number in train} & {read[number].conversation for number in held_out}
    assert 0.1 * len(rows) < len(held_out) <= 0.2 * len(rows)
    assert (train, held_out) == split_rows(read, share=0.2, seed=0)


def test_folder_and_hub_dataset_give_their_training_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"):
        _jsonl(tmp_path / name, [{"text": name, "label": "x"}])
    assert [row.fields["text"] for row in read_all_rows([str(tmp_path)])] == ["train-00000-of-00001.jsonl"]
    commit = "1" * 40
    # A dataset as huggingface_hub itself keeps it, found by huggingface_hub itself without a network.
    repo = tmp_path / "cache" / "datasets--org--reviews"
    (repo / "snapshots" / commit / "data").mkdir(parents=True)
    _jsonl(repo / "snapshots" / commit / "data" / "train.jsonl", [{"text": "a", "label": "b"}])
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert [path.name for path in data_files("hf:org/reviews")] == ["train.jsonl"]
    with pytest.raises(LoractlError, match="hf:org/nobody"):
        data_files("hf:org/nobody")


_CALLS = (
    '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "%s", "arguments": {}}}]}], '
    '"tools": [{"type": "function", "function": {"name": "get_weather"}}]}\n'
)
_CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.mark.parametrize(
    ("name", "text", "says", "hint"),
    [
        (
            "a.jsonl",
            '{"txt": "x", "label": "y"}\n',
            r"a\.jsonl:1:2: no column `text`, but `txt`",
            "did you mean `text`",
        ),
        (
            "a.jsonl",
            '{"prompt": "x", "completion": "y"}\n{"prompt": "x", "complete": "y"}\n',
            r":2:17: ",
            "`completion`",
        ),
        ("a.jsonl", '{"prompt": "x", "completion": null}\n', r":1:17: completion is null", "the row"),
        ("a.jsonl", '{"text": "x", "label": "y"}\n{"text": "x"}\n', r"a\.jsonl:2: has 'text'", "text and label"),
        ("a.jsonl", '{"prompt": "x" "completion": "y"}\n', r"a\.jsonl:1:16: not JSON: Expecting ','", "near"),
        ("a.json", '[\n {"text": "x", "label": "y"},\n {"text": ]\n', r"a\.json:3:11: not JSON", "near"),
        ("a.csv", "text,label\nx,y\n\nz\n", r"a\.csv:4: not the 2 columns", "quotes"),
        ("a.csv", "text,lable\nx,y\n", r"a\.csv:2: no column `label`, but `lable`", "`label`"),
        ("a.csv", "review,lable\nx,y\n", r"a\.csv:2: no column `label`, but `lable`", "`label`"),
        (
            "a.jsonl",
            _CHAT + '{"messages": [{"role": "asistant", "content": "b"}]}\n',
            r":2:16: messages\[0\]\.role",
            "`assistant`",
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}\n',
            r"arguments is not JSON",
            "",
        ),
        (
            "a.jsonl",
            _CALLS % "get_wether",
            "calls 'get_wether', which tools lacks",
            "did you mean `get_weather`",
        ),
    ],
)
def test_wrong_row_is_named_to_the_column_with_what_was_meant(
    tmp_path: Path, name: str, text: str, says: str, hint: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadRow, match=says) as caught:
        read_rows(tmp_path / name)
    assert hint in (caught.value.hint or "")
