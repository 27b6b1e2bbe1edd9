"""Probe prompts: what adapter and base say after a few held-out prompts, so that a server can check what it loaded."""

from collections.abc import Iterator, Sequence
from typing import Any

from loractl.adapters.manifest import Probe
from loractl.adapters.training.examples import Example

_MAX_CONTINUATION_TOKENS = 8
_DECIMALS = 5
_PASS_TOKENS = 1024


def make_probes(model: Any, examples: Sequence[Example]) -> list[Probe]:
    """Score each example's first learned tokens with the adapter and without, in eval mode."""
    model.eval()
    asked = []
    for example in examples:
        start = max(1, example.learned.index(True))
        stop = min(len(example.ids), start + _MAX_CONTINUATION_TOKENS)
        asked.append((list(example.ids[:start]), list(example.ids[start:stop])))
    with_adapter = _logprobs(model, asked)
    with model.disable_adapter():
        without = _logprobs(model, asked)
    return [
        Probe(prompt_ids=prompt, continuation_ids=continuation, adapter_logprobs=ours, base_logprobs=bare)
        for (prompt, continuation), ours, bare in zip(asked, with_adapter, without, strict=True)
    ]


def probe_drift(model: Any, probes: Sequence[Probe]) -> float:
    """Score recorded probes with a model that holds the adapter; returns the largest difference in nats."""
    model.eval()
    now = _logprobs(model, [(probe.prompt_ids, probe.continuation_ids) for probe in probes])
    return max(
        abs(score - then)
        for probe, scores in zip(probes, now, strict=True)
        for score, then in zip(scores, probe.adapter_logprobs, strict=True)
    )


def _logprobs(model: Any, asked: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
    """The log probability of each token of each continuation; prompts go through the model together."""
    import torch

    from loractl.adapters.training.batches import collate
    from loractl.adapters.training.loss import learned_positions, position_losses

    found: list[list[float]] = []
    for chunk in _chunks(asked):
        examples = [
            Example((*prompt, *continuation), (*[False] * len(prompt), *[True] * len(continuation)))
            for prompt, continuation in chunk
        ]
        with torch.inference_mode():
            before, targets, _ = learned_positions(model, collate(examples, next(model.parameters()).device))
            scores = (-position_losses(model, before, targets)).tolist()
        for _, continuation in chunk:
            found.append([round(value, _DECIMALS) for value in scores[: len(continuation)]])
            del scores[: len(continuation)]
    return found


def _chunks(asked: Sequence[tuple[list[int], list[int]]]) -> Iterator[list[tuple[list[int], list[int]]]]:
    chunk: list[tuple[list[int], list[int]]] = []
    for one in asked:
        longest = max(len(prompt) + len(continuation) for prompt, continuation in [*chunk, one])
        if chunk and (len(chunk) + 1) * longest > _PASS_TOKENS:
            yield chunk
            chunk = []
        chunk.append(one)
    if chunk:
        yield chunk
