"""What goes into the engine and what comes out: plain, frozen, typed messages.

In: `Submit`, `Cancel`. Out, per request: any number of `Token`, then exactly one of `Finished` and `Failed`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NewType

from loractl.adapters.errors import LoractlError
from loractl.adapters.reference import Digest

RequestId = NewType("RequestId", str)

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterUse:
    """One adapter that a request runs with; several are summed by weight, without a merge.

    `folder` holds the adapter's files on the local disk, checked against `digest` by whoever put them there.
    """

    digest: Digest
    folder: Path
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """What the output must match: a JSON schema, a regular expression, one of several strings, or a grammar."""

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    value: str = ""
    """The schema as JSON text, the expression, the choices as a JSON array of strings, or the grammar in Lark."""
    field: str = dataclasses.field(default="constraint", compare=False)
    """Where the request asked for it, for errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen; the defaults are OpenAI's, the extra fields vLLM's. temperature 0 is greedy."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    """Whether a matched stop string stays in the text."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int | None = None
    """How many most likely tokens are reported beside each chosen one; 0 reports the chosen one alone."""
    num_prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    """Where nothing can follow, the output ends with reason "stop", whatever `min_tokens` and `ignore_eos` say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """One sequence to generate; `n` choices are `n` submits, which share their prompt's KV blocks."""

    id: RequestId
    prompt: tuple[int, ...]
    sampling: Sampling
    adapters: tuple[AdapterUse, ...] = ()
    """Empty: the bare base."""
    tenant: str = ""
    """Whose share of the engine this uses; also salts the prefix cache, so tenants cannot probe each other."""
    weight: float = 1.0
    """The tenant's share, relative to others'."""
    priority: int = 0
    """Higher runs sooner."""
    deadline_s: float | None = None
    """On `time.monotonic()`'s clock; a request that would start after it fails at once."""
    wants_embedding: bool = False
    """Read the prompt and give its embedding; nothing is generated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Stop this request; its `Finished` says "cancelled". Unknown and ended ids are ignored."""

    id: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """One token of the vocabulary and its log probability at some position."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds a request spent in each phase, on the engine's monotonic clock."""

    queued_s: float = 0.0
    adapter_wait_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One generated token. `text` is what can be shown now: held back while a stop string or a character is open."""

    id: RequestId
    token_id: int
    text: str
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()
    timing: Timing | None = None
    """On the first token alone: how long the request waited for it, and for what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The request ended as it should. `text` is the tail that no `Token` has carried yet."""

    id: RequestId
    reason: FinishReason
    text: str = ""
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it, if one did."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    prompt_logprobs: tuple[tuple[TokenLogprob, ...], ...] | None = None
    """Per prompt position after the first: the actual token first, then the most likely ones."""
    embedding: tuple[float, ...] | None = None
    """The last token's hidden state before the head, of length 1; for a request that wants it."""
    timing: Timing = Timing()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The request ended by an error; nothing more comes."""

    id: RequestId
    error: LoractlError


Event = Token | Finished | Failed
