"""From a step's logits to each request's next token, its text and its end. Knows no blocks or slots.

What it returns of a sequence may end with `Finished` or `Failed`: taking the sequence out of the books is the engine's.
"""

import time
from collections.abc import Sequence as Items

from torch import Tensor

from loractl.adapters.errors import EngineFailure, WillNotFit
from loractl.server.engine.base_model import BaseModel
from loractl.server.engine.constraint import TokenGate
from loractl.server.engine.kernels.scan import scan_rows
from loractl.server.engine.messages import Event, Failed, FinishReason, RequestId, Submit, Token
from loractl.server.engine.row_choice import Draw, Picks, pick_rows
from loractl.server.engine.sampler import Choice, RowSampler, prompt_logprobs
from loractl.server.engine.sequence import Sequence
from loractl.server.engine.text import TextStream

Rows = list[tuple[Sequence, int, int]]
"""What a run computed: sequences, how many of their tokens, and how many rows of logits belong to each."""


class NextTokens:
    """Chooses tokens for all running sequences; holds the sampler of each request that is open."""

    def __init__(self, base: BaseModel, *, max_model_len: int, on_device: bool) -> None:
        self._base = base
        self._max_model_len = max_model_len
        self._on_device = on_device
        """Whether tokens are chosen where the logits are; else row by row here, which a CPU does faster."""
        self._samplers: dict[RequestId, RowSampler] = {}
        self.num_chosen = 0
        """Tokens that were chosen, ends included."""

    def begin(self, submit: Submit, gate: TokenGate | None) -> Sequence:
        """Start a request's sequence: its text, its sampler."""
        text = TextStream(
            self._base.tokenizer,
            prompt=submit.prompt,
            stops=submit.sampling.stop,
            include_stop=submit.sampling.include_stop,
        )
        self._samplers[submit.id] = RowSampler(
            submit.sampling, prompt=submit.prompt, eos_token_ids=self._base.eos_token_ids, gate=gate
        )
        return Sequence.of(submit, text)

    def forget(self, sequence: Sequence) -> None:
        """Drop the sampler of a sequence that has ended."""
        del self._samplers[sequence.id]

    def is_left_to_device(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether a step over `num_tokens` more chooses this sequence's next token, and the device does so alone."""
        is_plain = self._samplers[sequence.id].is_plain(sequence.num_outputs)
        return (
            self._on_device
            and num_tokens == sequence.num_pending
            and is_plain
            and not (sequence.submit.wants_embedding or sequence.wants_prompt_logprobs)
        )

    def is_last(self, sequence: Sequence) -> bool:
        """Whether the next token is the last that its length allows, whichever it is."""
        is_full = len(sequence.tokens) + 1 >= self._max_model_len
        return is_full or sequence.num_outputs + 1 >= sequence.submit.sampling.max_tokens

    def pick(self, rows: Rows, logits: Tensor) -> Picks | None:
        """Begin to choose the tokens that are due from logits [rows that want them, vocabulary] on the device; None
        where `take` does so."""
        if not self._on_device or not logits.numel():
            return None
        draws: list[Draw | None] = []
        for sequence, num_tokens, num_logits in rows:
            draws += [None] * num_logits
            if num_tokens == sequence.num_pending:
                draws[-1] = self._samplers[sequence.id].draw(sequence.num_outputs)
        return pick_rows(logits, draws)

    def pick_ahead(self, sequences: Items[Sequence], logits: Tensor) -> Picks:
        """As `pick`, of the tokens after those that are still to be read; logits [sequences, vocabulary]."""
        return pick_rows(logits, [self._samplers[each.id].draw(each.num_outputs + 1) for each in sequences])

    def land(self, sequence: Sequence, token_id: int, *, is_finite: bool) -> list[Event]:
        """Advance a sequence by the token that the device chose alone."""
        return self._append(sequence, Choice(token_id)) if is_finite else [_not_finite(sequence)]

    def take(self, rows: Rows, logits: Tensor, hidden: Tensor | None, picks: Picks | None) -> list[list[Event]]:
        """Advance what was computed of each sequence by one token where that is due; the counts of computed tokens in
        the sequences are still those before the run.

        logits [rows that want them, vocabulary] lie in the order of `rows`; hidden, if any, beside them.
        """
        taken: list[list[Event]] = []
        likeliest, finite = scan_rows(logits) if picks is None else picks.read()
        row = 0
        for sequence, num_tokens, num_logits in rows:
            mine = logits[row : row + num_logits]
            row += num_logits
            if sequence.wants_prompt_logprobs:
                sequence.prompt_logprobs += prompt_logprobs(
                    mine,
                    sequence.tokens[: sequence.num_prompt],
                    first=sequence.num_computed,
                    num_top=sequence.submit.sampling.num_prompt_logprobs or 0,
                )
            events: list[Event] = []
            is_due = num_tokens == sequence.num_pending
            if is_due and hidden is not None and sequence.submit.wants_embedding:
                events = [_embedding(sequence, hidden[row - 1])]
            elif is_due and not finite[row - 1]:
                events = [_not_finite(sequence)]
            elif is_due:
                events = self._advance(sequence, mine[-1], likeliest[row - 1], is_picked=picks is not None)
            taken.append(events)
        return taken

    def _advance(self, sequence: Sequence, logits: Tensor, likeliest: int, *, is_picked: bool) -> list[Event]:
        """Choose a sequence's next token, unless `likeliest` is what the device picked for it, and append it."""
        sampler = self._samplers[sequence.id]
        is_drawn = is_picked and sampler.is_plain(sequence.num_outputs)
        outputs = sequence.tokens[sequence.num_prompt :]
        choice = sampler.choose(logits, outputs, likeliest=likeliest, is_drawn=is_drawn)
        return self._append(sequence, choice)

    def _append(self, sequence: Sequence, choice: Choice) -> list[Event]:
        """Add a sequence's next token, show its text, and end it where it must end."""
        sampling = sequence.submit.sampling
        sampler = self._samplers[sequence.id]
        if sampler.gate is not None and (failure_text := sampler.gate.failure) is not None:
            refusal = WillNotFit(f"the output's constraint became too complex: {failure_text}", field="response_format")
            return [Failed(id=sequence.id, error=refusal)]
        now = time.monotonic()
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        sequence.tokens.append(choice.token_id)
        self.num_chosen += 1
        if self._ends_at(choice.token_id, sequence):
            stop_id = choice.token_id if choice.token_id in sampling.stop_token_ids else None
            return [sequence.finished("stop", stop_reason=stop_id)]
        return self._show(sequence, choice, sampler.gate, now)

    def _show(self, sequence: Sequence, choice: Choice, gate: TokenGate | None, now: float) -> list[Event]:
        """Put a token's text out, and end the sequence if its text or its length says so."""
        sampling = sequence.submit.sampling
        piece = sequence.text.push(choice.token_id, min_tokens_reached=sequence.num_outputs >= sampling.min_tokens)
        events: list[Event] = [
            Token(
                id=sequence.id,
                token_id=choice.token_id,
                text=piece.text,
                logprob=choice.logprob,
                top=choice.top,
                timing=sequence.timing(now) if sequence.num_outputs == 1 else None,
            )
        ]
        reason: FinishReason | None = None
        if piece.stop is not None:
            events.append(sequence.finished("stop", stop_reason=piece.stop, tail=False))
        elif gate is not None and gate.is_complete:
            reason = "stop"
        elif sequence.num_outputs >= sampling.max_tokens or len(sequence.tokens) >= self._max_model_len:
            reason = "length"
        if reason is not None:
            events.append(sequence.finished(reason))
        return events

    def _ends_at(self, token_id: int, sequence: Sequence) -> bool:
        """Whether a chosen token is an end and not a part of the output."""
        sampling = sequence.submit.sampling
        is_eos, is_stop = token_id in self._base.eos_token_ids, token_id in sampling.stop_token_ids
        if sampling.constraint is not None:
            return is_eos or is_stop  # a sampler chooses no end against `min_tokens` unless nothing else is allowed
        return (is_stop or (is_eos and not sampling.ignore_eos)) and sequence.num_outputs >= sampling.min_tokens


def _embedding(sequence: Sequence, hidden: Tensor) -> Event:
    """End a sequence with what its last token came to."""
    wide = hidden.float()
    unit = wide / wide.norm()
    if not bool(unit.isfinite().all()):
        return _not_finite(sequence)
    return sequence.finished("stop", embedding=tuple(unit.tolist()))


def _not_finite(sequence: Sequence) -> Failed:
    error = EngineFailure("the model's output is not finite with this adapter and prompt")
    return Failed(id=sequence.id, error=error)
