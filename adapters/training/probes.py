"""Probe prompts: what adapter and base say after a few held-out prompts, so that a server can check what it loaded."""

from collections.abc import Sequence
from typing import Any

from loractl.adapters.manifest import Probe
from loractl.adapters.training.examples import Example

_MAX_CONTINUATION_TOKENS = 8
_DECIMALS = 5


def make_probes(model: Any, examples: Sequence[Example]) -> list[Probe]:
    """Score each example's first learned tokens with the adapter and without, in eval mode."""
    model.eval()
    probes = []
    for example in examples:
        start = max(1, example.learned.index(True))
        stop = min(len(example.ids), start + _MAX_CONTINUATION_TOKENS)
        prompt, continuation = list(example.ids[:start]), list(example.ids[start:stop])
        with_adapter = _logprobs(model, prompt, continuation)
        with model.disable_adapter():
            without = _logprobs(model, prompt, continuation)
        probes.append(
            Probe(
                prompt_ids=prompt,
                continuation_ids=continuation,
                adapter_logprobs=with_adapter,
                base_logprobs=without,
            )
        )
    return probes


def probe_drift(model: Any, probes: Sequence[Probe]) -> float:
    """Score recorded probes with a model that holds the adapter; returns the largest difference in nats."""
    model.eval()
    return max(
        abs(now - then)
        for probe in probes
        for now, then in zip(
            _logprobs(model, probe.prompt_ids, probe.continuation_ids), probe.adapter_logprobs, strict=True
        )
    )


def _logprobs(model: Any, prompt: list[int], continuation: list[int]) -> list[float]:
    import torch

    device = next(model.parameters()).device
    ids = torch.tensor([prompt + continuation], device=device)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    scores = torch.log_softmax(logits, dim=-1)
    chosen = scores.gather(1, ids[0, len(prompt) :].unsqueeze(1)).squeeze(1)
    return [round(value, _DECIMALS) for value in chosen.tolist()]
