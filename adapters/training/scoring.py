"""Scores rows with a base and adapters: loss, exact answers, the right label or choice, and answers written out.

Rows of several adapters share every forward pass, as in the server. Reads no data files, writes nothing.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer

from loractl.adapters.training.batches import collate
from loractl.adapters.training.examples import Example, make_example
from loractl.adapters.training.grouped import grouped_layers
from loractl.adapters.training.loss import learned_positions
from loractl.adapters.training.recipe import DataPart
from loractl.adapters.training.rows import Row

BASE = "base"
_PASS_TOKENS = 2048
_MAX_LABELS = 20
_GENERATED_TOGETHER = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Figures of one adapter, or of the bare base; a part that the data cannot tell is None."""

    name: str
    loss: float
    """Mean cross entropy per learned token."""
    exact_match: float
    """Share of the rows whose whole answer, stop token included, greedy decoding would write."""
    accuracy: float | None
    """Share of the rows whose right label, choice or preferred answer is the likeliest of all."""
    num_rows: int


@dataclass(frozen=True, slots=True)
class _Part:
    """One example under one adapter."""

    name: str
    example: Example
    index: int


@dataclass(frozen=True, slots=True)
class _Found:
    nats: float
    num_learned: int
    is_exact: bool


class Scorer:
    """A base with adapters, each under its own name; `BASE` is the base alone."""

    def __init__(self, base: Any, adapters: Sequence[tuple[str, Path]]) -> None:
        self.names = [BASE, *(name for name, _ in adapters)]
        self._keys = {BASE: BASE} | {name: f"adapter{number}" for number, (name, _) in enumerate(adapters)}
        self.model: Any = base
        for name, folder in adapters:
            if self.model is base:
                self.model = PeftModel.from_pretrained(base, str(folder), adapter_name=self._keys[name])
            else:
                self.model.load_adapter(str(folder), adapter_name=self._keys[name])
        self.model.eval()
        self.shares_passes = bool(adapters) and _can_share(self.model)

    def score(self, rows: Sequence[Row], tokenizer: Any, data: DataPart) -> list[Score]:
        """Score every name on the same rows."""
        examples = [make_example(row, tokenizer, data) for row in rows]
        found = self._measure(examples)
        hits = self._hits(rows, tokenizer, data)
        scores = []
        for name in self.names:
            own = found[name]
            num_learned = sum(one.num_learned for one in own)
            scores.append(
                Score(
                    name=name,
                    loss=sum(one.nats for one in own) / max(1, num_learned),
                    exact_match=sum(one.is_exact for one in own) / len(rows),
                    accuracy=hits[name] / len(rows) if hits else None,
                    num_rows=len(rows),
                )
            )
        return scores

    def answers(self, prompts: Sequence[Sequence[int]], tokenizer: Any, *, max_new_tokens: int) -> dict[str, list[str]]:
        """Let every name go on from each prompt, greedily; the stop token is left out."""
        groups = [self.names] if self.shares_passes else [[name] for name in self.names]
        written: dict[str, list[str]] = {}
        for names in groups:
            ids, attended = _padded_before(list(prompts) * len(names))
            with self._active([(name, len(prompts)) for name in names]), torch.inference_mode():
                output = self.model.generate(
                    input_ids=ids.to(self.model.device),
                    attention_mask=attended.to(self.model.device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.eos_token_id,
                )
            texts = [str(tokenizer.decode(one, skip_special_tokens=True)) for one in output[:, ids.shape[1] :]]
            for number, name in enumerate(names):
                written[name] = texts[number * len(prompts) : (number + 1) * len(prompts)]
        return written

    def _hits(self, rows: Sequence[Row], tokenizer: Any, data: DataPart) -> dict[str, int]:
        """Count rows whose right candidate is the likeliest; nothing where there are no candidates."""
        candidates = [_candidates(row, rows, tokenizer, data) for row in rows]
        if not all(candidates):
            return {}
        found = self._measure([example for own in candidates for example, _ in own])
        hits = dict.fromkeys(self.names, 0)
        for name in self.names:
            position = 0
            for own in candidates:
                nats = [one.nats for one in found[name][position : position + len(own)]]
                position += len(own)
                hits[name] += own[nats.index(min(nats))][1]
        return hits

    def _measure(self, examples: Sequence[Example]) -> dict[str, list[_Found]]:
        order = sorted(range(len(examples)), key=lambda index: len(examples[index].ids))
        groups = [self.names] if self.shares_passes else [[name] for name in self.names]
        found: dict[str, dict[int, _Found]] = {name: {} for name in self.names}
        for names in groups:
            for chosen in _chunks(order, examples, num_names=len(names)):
                parts = [_Part(name, examples[index], index) for name in names for index in chosen]
                with self._active([(name, len(chosen)) for name in names]):
                    for part, one in zip(parts, _measured(self.model, parts), strict=True):
                        found[part.name][part.index] = one
        return {name: [own[index] for index in range(len(examples))] for name, own in found.items()}

    @contextmanager
    def _active(self, segments: Sequence[tuple[str, int]]) -> Iterator[None]:
        """Compute rows that lie by name with each name's adapter."""
        if self.shares_passes:
            with grouped_layers(self.model, [(self._keys[name], num_rows) for name, num_rows in segments]):
                yield
            return
        ((name, _),) = segments
        if name != BASE:
            self.model.set_adapter(self._keys[name])
        without = self.model.disable_adapter() if name == BASE and len(self.names) > 1 else nullcontext()
        with without:
            yield


def _chunks(order: Sequence[int], examples: Sequence[Example], *, num_names: int) -> Iterator[list[int]]:
    chunk: list[int] = []
    for index in order:
        if chunk and (len(chunk) + 1) * num_names * len(examples[index].ids) > _PASS_TOKENS:
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk


def _measured(model: Any, parts: Sequence[_Part]) -> list[_Found]:
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.inference_mode():
        tensors = collate([part.example for part in parts], causal_lm.device)
        before, targets, rows = learned_positions(model, tensors)
        logits = causal_lm.get_output_embeddings()(before).float()
        nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        right = logits.argmax(-1) == targets
    counts = torch.bincount(rows, minlength=len(parts)).tolist()
    results = []
    for own, hit, count in zip(torch.split(nats.cpu(), counts), torch.split(right.cpu(), counts), counts, strict=True):
        results.append(_Found(float(own.double().sum()), count, bool(hit.all())))
    return results


def _can_share(model: Any) -> bool:
    """Plain low-rank layers alone can take rows of several adapters; DoRA and embeddings go one by one."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return not any(layer.lora_embedding_A or any(layer.use_dora.values()) for layer in layers)


def _answer_key(row: Row) -> str:
    return "completion" if "completion" in row.fields else row.form.rpartition("+")[2]


def _candidates(row: Row, rows: Sequence[Row], tokenizer: Any, data: DataPart) -> list[tuple[Example, bool]]:
    """The examples that are compared, and which of them is right."""
    if row.form == "preference":
        return [(one, number == 0) for number, one in enumerate(make_example(row, tokenizer, data).sequences)]
    key = _answer_key(row)
    return [
        (make_example(replace(row, fields={**row.fields, key: answer}), tokenizer, data), answer == row.fields[key])
        for answer in _candidate_answers(row, rows)
    ]


def _candidate_answers(row: Row, rows: Sequence[Row]) -> list[str]:
    """The answers that are compared: the row's own choices, or all labels of the data where they are few."""
    if "choices" in row.fields:
        return list(row.fields["choices"])
    key = _answer_key(row)
    if key not in row.fields or row.form == "text":
        return []
    labels = sorted({str(other.fields[key]) for other in rows})
    return labels if 1 < len(labels) <= _MAX_LABELS and len(labels) * 2 <= len(rows) else []


def _padded_before(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Put padding before the prompts, so that all go on from the same column."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    attended = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attended[row, longest - len(prompt) :] = 1
    return ids, attended


def written_answers(
    scorer: Scorer, rows: Sequence[Row], tokenizer: Any, data: DataPart, *, max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """Yield for each row its place, the right answer, and what every name writes."""
    for start in range(0, len(rows), _GENERATED_TOGETHER):
        chunk = rows[start : start + _GENERATED_TOGETHER]
        examples = [make_example(row, tokenizer, data) for row in chunk]
        begins = [_last_answer(example) for example in examples]
        prompts = [example.ids[:begin] for example, begin in zip(examples, begins, strict=True)]
        written = scorer.answers(prompts, tokenizer, max_new_tokens=max_new_tokens)
        for number, (row, example, begin) in enumerate(zip(chunk, examples, begins, strict=True)):
            right = str(tokenizer.decode(example.ids[begin:], skip_special_tokens=True))
            yield {"row": row.place, "right": right, "answers": {name: own[number] for name, own in written.items()}}


def _last_answer(example: Example) -> int:
    """Where the last learned stretch begins; at least one token stands before it."""
    end = max(index for index, learned in enumerate(example.learned) if learned)
    while end > 1 and example.learned[end - 1]:
        end -= 1
    return end


def timed_scores(scorer: Scorer, rows: Sequence[Row], tokenizer: Any, data: DataPart) -> tuple[list[Score], float]:
    """Score and tell the seconds it took."""
    start = time.perf_counter()
    return scorer.score(rows, tokenizer, data), time.perf_counter() - start
