"""Which tokens may come next in a constrained output, by llguidance's grammars. Knows no logits and no requests.

A grammar is compiled in its caller's thread, never in a step. What one step may cost is bounded by the library's own
limits: its fuel counts work, not time, so the same request fails or runs alike on every machine.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from loractl.adapters.errors import BadRequest
from loractl.server.engine.messages import Constraint

_LIMITS = LLParserLimits(
    max_grammar_size=100_000,
    # One state is one to two kB, and a hostile expression makes a new one at each token.
    max_lexer_states=20_000,
    verbose_errors=False,
)
# Unlimited whitespace lets a model that has lost its way write nothing else until its tokens are used up.
_JSON_OPTIONS = {"whitespace_pattern": r"[ \t\r\n]{1,16}", "lenient": False, "coerce_one_of": False}
_MAX_KEPT = 64
_UNIMPLEMENTED = re.compile(r"Unimplemented keys: \[(?P<keys>[^\]]*)\]")


class TokenGate:
    """One sequence's place in its grammar; feed it every token that was chosen."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> Tensor:
        """What may come next [vocabulary], bool; end-of-text tokens may where the output could end."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool))

    def take(self, token_id: int) -> None:
        """Go on by a token that was allowed."""
        self._matcher.consume_token(token_id)

    @property
    def may_end(self) -> bool:
        """Whether what has come so far is a whole output."""
        return self._matcher.is_accepting()

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow what has come so far."""
        return self._matcher.is_stopped()

    @property
    def failure(self) -> str | None:
        """Why the grammar can go no further although it should: a limit was met."""
        return _first_line(self._matcher.get_error()) if self._matcher.is_error() else None


class Grammars:
    """Compiles constraints for one tokenizer and keeps the latest; may be called from any thread but the engine's."""

    def __init__(self, tokenizer: Any, *, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._vocabulary: LLTokenizer | None = None
        self._kept: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._lock, self._vocabulary_lock = threading.Lock(), threading.Lock()

    def gate(self, constraint: Constraint) -> TokenGate:
        """The beginning of an output under this constraint; raises BadRequest, naming what is not served."""
        with self._lock:
            matcher = self._kept.get(constraint)
        if matcher is None:
            matcher = self._compile(constraint)  # without the lock: nobody waits for another's grammar
        with self._lock:
            self._kept[constraint] = matcher
            self._kept.move_to_end(constraint)
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
            return TokenGate(matcher.deep_copy(), self._vocab_size)

    def _compile(self, constraint: Constraint) -> LLMatcher:
        try:
            grammar = _grammar_of(constraint)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"{constraint.field}: {error}", field=constraint.field) from error
        matcher = LLMatcher(self._tokens(), grammar, limits=_LIMITS, log_level=0)
        if matcher.is_error():
            raise _refusal(constraint, matcher.get_error())
        return matcher

    def _tokens(self) -> LLTokenizer:
        """The tokenizer as the library knows it; made at first use, as it takes up to a second."""
        with self._vocabulary_lock:
            if self._vocabulary is None:
                from llguidance.hf import from_tokenizer

                self._vocabulary = from_tokenizer(
                    self._tokenizer,
                    n_vocab=max(self._vocab_size, len(self._tokenizer)),
                    eos_token=self._eos_token_ids or None,
                )
            return self._vocabulary


def json_rule(schema: object) -> str:
    """JSON of a schema as one term of a Lark grammar, for constraints of kind `grammar`."""
    return f"%json {_schema_text(schema)}"


def _grammar_of(constraint: Constraint) -> str:
    match constraint.kind:
        case "json_object":
            return LLMatcher.grammar_from_json_schema(_schema_text({"type": "object"}))
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(_schema_text(json.loads(constraint.value)))
        case "regex":
            return LLMatcher.grammar_from_regex(constraint.value)
        case "choice":
            choices = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(constraint.value))
            return LLMatcher.grammar_from_lark("start: " + " | ".join(choices))
        case "grammar":
            return LLMatcher.grammar_from_lark(constraint.value)


def _schema_text(schema: object) -> str:
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema is an object")
    # Whoever asks must not be able to ask for leniency, which would make the promise hollow.
    return json.dumps({**schema, "x-guidance": _JSON_OPTIONS})


def _refusal(constraint: Constraint, text: str) -> BadRequest:
    if found := _UNIMPLEMENTED.search(text):
        keys = found["keys"].replace('"', "")
        return BadRequest(
            f"{constraint.field}: this schema uses {keys}, which outputs cannot be held to here",
            hint="leave it out, and check the answer for it",
            field=constraint.field,
        )
    return BadRequest(f"{constraint.field}: {_first_line(text)}", field=constraint.field)


def _first_line(text: str) -> str:
    """The cause in a report of several lines, without the grammar that it quotes."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    cause = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
    return (cause or (lines[0] if lines else "it cannot be compiled"))[:300]
