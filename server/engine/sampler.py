"""Chooses the next token of each row from its logits. Knows one row at a time: no neighbour changes a choice."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass

import torch
from torch import Tensor

from loractl.server.engine.constraint import TokenGate
from loractl.server.engine.messages import Sampling, TokenLogprob
from loractl.server.engine.row_choice import Draw


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token, its log probability before any filter but after penalties, and the likeliest ones beside it."""

    token_id: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()


class RowSampler:
    """The sampler of one request; its random numbers come from its own seed, whatever runs beside it."""

    def __init__(
        self,
        sampling: Sampling,
        *,
        prompt: Tokens[int],
        eos_token_ids: frozenset[int],
        gate: TokenGate | None = None,
    ) -> None:
        self.gate = gate
        self._sampling = sampling
        self._prompt = prompt
        self._eos = tuple(sorted(eos_token_ids))
        self._ends = tuple(sorted(eos_token_ids | set(sampling.stop_token_ids)))
        self._is_plain = (
            gate is None
            and sampling.num_logprobs is None
            and sampling.repetition_penalty == 1.0
            and not (sampling.presence_penalty or sampling.frequency_penalty or sampling.logit_bias)
        )
        self._drawn = -1, 0.0
        self._generator: torch.Generator | None = None
        if sampling.temperature > 0:
            self._generator = torch.Generator()
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)

    def is_plain(self, num_outputs: int) -> bool:
        """Whether a device may choose the token after `num_outputs` by itself, and nothing but it is asked for."""
        return self._is_plain and num_outputs >= self._sampling.min_tokens

    def draw(self, num_outputs: int) -> Draw | None:
        """How a device draws the token after `num_outputs` by itself; None where it is the likeliest, or chosen
        here."""
        sampling = self._sampling
        if self._generator is None or not self.is_plain(num_outputs):
            return None
        if self._drawn[0] != num_outputs:  # a step that is computed again must not change what comes of it
            self._drawn = num_outputs, float(torch.rand((), dtype=torch.float64, generator=self._generator))
        return Draw(self._drawn[1], sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p)

    def choose(
        self, logits: Tensor, outputs: Tokens[int], *, likeliest: int | None = None, is_drawn: bool = False
    ) -> Choice:
        """Pick from `logits` [vocabulary] after `outputs` were generated; `likeliest` is their largest's place, if
        known, or with `is_drawn` the token that the device drew."""
        sampling = self._sampling
        is_greedy = self._generator is None and self.is_plain(len(outputs))
        if likeliest is not None and (is_drawn or is_greedy):
            return Choice(likeliest)
        # A copy: tensors made in inference mode refuse to be changed outside it.
        row = self._penalized(logits.to("cpu", torch.float32, copy=True), outputs)
        filtered = self._filtered(row, len(outputs))
        token_id = int(filtered.argmax()) if self._generator is None else self._draw(filtered)
        if self.gate is not None and token_id not in self._ends:
            self.gate.take(token_id)
        if sampling.num_logprobs is None:
            return Choice(token_id)
        logprobs = torch.log_softmax(row, dim=-1)
        top: tuple[TokenLogprob, ...] = ()
        if sampling.num_logprobs:
            values, ids = logprobs.topk(sampling.num_logprobs)
            pairs = zip(ids.tolist(), values.tolist(), strict=True)
            top = tuple(TokenLogprob(token_id=index, logprob=value) for index, value in pairs)
        return Choice(token_id, float(logprobs[token_id]), top)

    def _filtered(self, row: Tensor, num_outputs: int) -> Tensor:
        """Without the tokens that the constraint forbids, nor ends that come too early; never without all of them."""
        sampling = self._sampling
        unwanted = self._ends if num_outputs < sampling.min_tokens else ()
        if self.gate is None:
            return row.index_fill(0, torch.tensor(unwanted, device=row.device), -torch.inf) if unwanted else row
        allowed = self.gate.allowed()
        if self.gate.may_end:
            allowed[list(sampling.stop_token_ids)] = True
        unwanted = unwanted or (self._eos if sampling.ignore_eos else ())
        if unwanted:
            others = allowed.index_fill(0, torch.tensor(unwanted), False)
            # Where nothing but an end is allowed, the constraint has the last word.
            allowed = others if others.any() else allowed
        return row.masked_fill(~allowed.to(row.device), -torch.inf)

    def _penalized(self, row: Tensor, outputs: Tokens[int]) -> Tensor:
        sampling = self._sampling
        if sampling.repetition_penalty != 1.0:
            seen = torch.tensor(sorted({*self._prompt, *outputs}))
            values = row[seen]
            penalty = sampling.repetition_penalty
            row[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if outputs and (sampling.presence_penalty or sampling.frequency_penalty):
            ids, counts = torch.unique(torch.tensor(outputs), return_counts=True)
            row[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        for token_id, bias in sampling.logit_bias.items():
            row[token_id] += bias
        return row

    def _draw(self, row: Tensor) -> int:
        sampling = self._sampling
        row = row / sampling.temperature
        if 0 < sampling.top_k < row.numel():
            row = row.masked_fill(row < row.topk(sampling.top_k).values[-1], -torch.inf)
        probabilities = torch.softmax(row, dim=-1)
        if sampling.min_p > 0:
            probabilities = probabilities.masked_fill(probabilities < sampling.min_p * probabilities.max(), 0.0)
        if sampling.top_p < 1.0:
            ordered, ids = probabilities.sort(descending=True)
            # A token stays while those before it do not yet hold the mass: the first always stays.
            outside = ordered.cumsum(0) - ordered >= sampling.top_p * ordered.sum()
            probabilities = probabilities.index_fill(0, ids[outside], 0.0)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def prompt_logprobs(logits: Tensor, prompt: Tokens[int], *, first: int, num_top: int) -> list[tuple[TokenLogprob, ...]]:
    """Log probabilities of the prompt's tokens after positions `first` and on, from `logits` [positions, vocabulary].

    Per position the token that stands there, then the likeliest ones; the model's own, no filter applied.
    """
    found = []
    for row, actual in zip(logits.cpu(), prompt[first + 1 :], strict=False):
        logprobs = torch.log_softmax(row.float(), dim=-1)
        values, ids = logprobs.topk(num_top)
        pairs = [(actual, float(logprobs[actual])), *zip(ids.tolist(), values.tolist(), strict=True)]
        found.append(tuple(TokenLogprob(token_id=index, logprob=value) for index, value in pairs))
    return found
