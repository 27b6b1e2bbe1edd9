"""From a decoded request and its adapters to what the engine is asked: prompts, sampling, limits.

Refuses to know HTTP and how answers are written.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from loractl.adapters.errors import BadRequest, ContextExceeded
from loractl.server.engine.messages import AdapterUse, Constraint, RequestId, Sampling, Submit
from loractl.server.fetch.source import Found
from loractl.server.metrics import Tier
from loractl.server.openai_wire import UNSUPPORTED_FIELDS, ChatRequest, Common, CompletionRequest
from loractl.server.output_form import constraint_of

DEFAULT_COMPLETION_TOKENS = 16
MAX_PROMPTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks, as far as the engine cares: whose share is used, and how large it is."""

    tenant: str = ""
    weight: float = 1.0
    max_priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedAdapter:
    """One adapter of a request and its weight in the sum."""

    found: Found
    weight: float = 1.0
    tier: Tier = "hit_gpu"
    """Where it was when the request came."""

    @property
    def use(self) -> AdapterUse:
        return AdapterUse(digest=self.found.digest, folder=self.found.folder, weight=self.weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Everything that is the same for all sequences of one HTTP request."""

    sampling: Sampling
    num_choices: int
    adapters: tuple[ServedAdapter, ...]
    caller: Caller
    priority: int = 0
    deadline_s: float | None = None

    def submits(self, prompts: Sequence[tuple[int, ...]], ids: Sequence[RequestId]) -> list[Submit]:
        """One Submit per prompt and choice, in the order of the answer's indexes."""
        uses = tuple(adapter.use for adapter in self.adapters)
        return [
            Submit(
                id=request_id,
                prompt=prompts[place // self.num_choices],
                sampling=self._for_choice(place % self.num_choices),
                adapters=uses,
                tenant=self.caller.tenant,
                weight=self.caller.weight,
                priority=min(self.priority, self.caller.max_priority),
                deadline_s=self.deadline_s,
            )
            for place, request_id in enumerate(ids)
        ]

    def _for_choice(self, choice: int) -> Sampling:
        if self.sampling.seed is None or choice == 0:
            return self.sampling
        # One seed must not make all choices the same.
        return dataclasses.replace(self.sampling, seed=self.sampling.seed + choice)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may ask for; the types of the wire hold the rest."""

    max_model_len: int
    max_tokens: int | None = None
    """Output tokens per sequence; None: what the model's window leaves."""
    max_prompt_tokens: int | None = None
    vocab_size: int = field(default=1 << 31)


def refuse_unsupported(request: msgspec.Struct) -> None:
    """Raise BadRequest for a field that OpenAI knows and this server does not serve."""
    for name in UNSUPPORTED_FIELDS:
        value = getattr(request, name, None)
        if value is None or bytes(value) in {b"null", b'["text"]'}:
            continue
        raise BadRequest(f"{name} is not supported here", hint="leave it out", field=name)


def chat_sampling(request: ChatRequest, *, num_prompt_tokens: int, limits: Limits) -> Sampling:
    """Sampling of a chat; without max_tokens a chat may use the whole window."""
    if request.top_logprobs is not None and not request.logprobs:
        raise BadRequest("top_logprobs needs logprobs", hint="set logprobs to true", field="top_logprobs")
    wanted = request.max_completion_tokens or request.max_tokens
    asked_by = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
    num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return _sampling(
        request,
        max_tokens=_room(num_prompt_tokens, wanted, limits, prompt_field="messages", tokens_field=asked_by),
        num_logprobs=num_logprobs,
        num_prompt_logprobs=request.prompt_logprobs,
        constraint=constraint_of(request, request.response_format),
        limits=limits,
    )


def completion_sampling(request: CompletionRequest, *, num_prompt_tokens: int, limits: Limits) -> Sampling:
    """Sampling of a plain completion: 16 tokens unless asked for more."""
    wanted = request.max_tokens or min(DEFAULT_COMPLETION_TOKENS, max(1, limits.max_model_len - num_prompt_tokens))
    num_prompt_logprobs = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        num_prompt_logprobs = max(request.logprobs, num_prompt_logprobs or 0)
    return _sampling(
        request,
        max_tokens=_room(num_prompt_tokens, wanted, limits, prompt_field="prompt", tokens_field="max_tokens"),
        num_logprobs=request.logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
        constraint=constraint_of(request, request.response_format),
        limits=limits,
    )


def _room(num_prompt_tokens: int, wanted: int | None, limits: Limits, *, prompt_field: str, tokens_field: str) -> int:
    """How many tokens may be generated; raises ContextExceeded naming what is too long."""
    window = limits.max_model_len
    longest = min(window - 1, limits.max_prompt_tokens or window)
    if num_prompt_tokens > longest:
        raise ContextExceeded(
            f"the prompt has {num_prompt_tokens} tokens, and at most {longest} fit",
            hint=f"this model's window is {window} tokens, prompt and output together",
            field=prompt_field,
        )
    room = window - num_prompt_tokens
    if wanted is None:
        return min(room, limits.max_tokens or room)
    if limits.max_tokens is not None and wanted > limits.max_tokens:
        raise BadRequest(f"{tokens_field} is above this server's limit of {limits.max_tokens}", field=tokens_field)
    if wanted > room:
        raise ContextExceeded(
            f"{num_prompt_tokens} tokens of prompt and {wanted} of output exceed the window of {window}",
            hint=f"ask for at most {room} tokens, or shorten the prompt",
            field=tokens_field,
        )
    return wanted


def _sampling(
    request: Common,
    *,
    max_tokens: int,
    num_logprobs: int | None,
    num_prompt_logprobs: int | None,
    constraint: Constraint | None,
    limits: Limits,
) -> Sampling:
    bias = request.logit_bias or {}
    for name, token_ids in (("logit_bias", list(bias)), ("stop_token_ids", request.stop_token_ids or [])):
        if token_ids and max(token_ids) >= limits.vocab_size:
            raise BadRequest(
                f"{name}: token id {max(token_ids)} is not in the vocabulary of {limits.vocab_size}", field=name
            )
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise BadRequest(f"min_tokens ({min_tokens}) is above max_tokens ({max_tokens})", field="min_tokens")
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=_or(request.temperature, 1.0),
        top_p=_or(request.top_p, 1.0),
        top_k=max(0, request.top_k or 0),
        min_p=request.min_p or 0.0,
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=bias,
        seed=request.seed,
        stop=tuple(stop),
        include_stop=request.include_stop_str_in_output,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=request.ignore_eos,
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
        constraint=constraint,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
