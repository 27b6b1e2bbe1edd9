"""Logits to tokens, request by request. Knows numbers and settings; nothing of text, blocks or adapters."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loractl.server.engine.messages import Sampling, TokenLogprob


@dataclass(frozen=True, slots=True)
class Choice:
    """One chosen token, with the log probabilities that were asked for, of the model's own distribution."""

    token_id: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)
class Chooser:
    """One request's way of choosing; with a seed the choices depend on nothing but the request."""

    sampling: Sampling
    prompt: Sequence[int]
    eos_token_ids: frozenset[int]
    generator: torch.Generator

    @classmethod
    def of(cls, sampling: Sampling, prompt: Sequence[int], eos_token_ids: frozenset[int]) -> "Chooser":
        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed & (1 << 63) - 1)
        return cls(sampling, prompt, eos_token_ids, generator)

    def choose(self, logits: Tensor, outputs: Sequence[int]) -> Choice:
        """Choose the next token; logits: [vocab] float32."""
        sampling = self.sampling
        adjusted = self._adjust(logits, outputs)
        if sampling.temperature <= 0:
            token_id = int(adjusted.argmax())
        else:
            token_id = self._draw(adjusted / sampling.temperature)
        if sampling.num_logprobs is None:
            return Choice(token_id)
        logprob, top = logprobs_of(logits, token_id, count=sampling.num_logprobs)
        return Choice(token_id, logprob, top)

    def _adjust(self, logits: Tensor, outputs: Sequence[int]) -> Tensor:
        sampling = self.sampling
        adjusted = logits
        if sampling.repetition_penalty != 1.0:
            adjusted = adjusted.clone()
            seen = torch.tensor(sorted({*self.prompt, *outputs}))
            values = adjusted[seen]
            penalty = sampling.repetition_penalty
            adjusted[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if outputs and (sampling.presence_penalty or sampling.frequency_penalty):
            ids, counts = torch.tensor(list(outputs)).unique(return_counts=True)
            adjusted = adjusted.clone()
            adjusted[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        if sampling.logit_bias:
            adjusted = adjusted.clone()
            for token_id, bias in sampling.logit_bias.items():
                adjusted[token_id] += bias
        if len(outputs) < sampling.min_tokens and (enders := [*self.eos_token_ids, *sampling.stop_token_ids]):
            adjusted = adjusted.clone()
            adjusted[torch.tensor(enders)] = float("-inf")
        return adjusted

    def _draw(self, logits: Tensor) -> int:
        sampling = self.sampling
        if sampling.top_k > 0 and sampling.top_k < logits.shape[0]:
            logits, ids = logits.topk(sampling.top_k)
        elif sampling.top_p < 1.0:
            logits, ids = logits.sort(descending=True)
        else:
            ids = None
        probs = torch.softmax(logits, dim=-1)
        if sampling.min_p > 0:
            probs = torch.where(probs < sampling.min_p * probs.max(), 0.0, probs)
        if ids is not None and sampling.top_p < 1.0:
            # Keep tokens until their sum reaches top_p; the first is always kept.
            before = (probs / probs.sum()).cumsum(-1).roll(1)
            before[0] = 0.0
            probs = torch.where(before < max(sampling.top_p, 1e-9), probs, 0.0)
        place = int(torch.multinomial(probs, 1, generator=self.generator))
        return place if ids is None else int(ids[place])


def logprobs_of(logits: Tensor, token_id: int, *, count: int) -> tuple[float, tuple[TokenLogprob, ...]]:
    """Log probability of one token and of the `count` most likely; logits: [vocab] float32."""
    logprobs = torch.log_softmax(logits, dim=-1)
    top: tuple[TokenLogprob, ...] = ()
    if count > 0:
        values, ids = logprobs.topk(min(count, logprobs.shape[0]))
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        top = tuple(TokenLogprob(token_id=each, logprob=value) for each, value in pairs)
    return float(logprobs[token_id]), top
