"""One request on its way through the engine: its tokens, blocks, adapters and clocks. Decides nothing."""

import time
from dataclasses import dataclass, field

from loractl.adapters.reference import Digest
from loractl.server.engine.kv_cache import BlockKey, child_key, root_key
from loractl.server.engine.messages import Finished, FinishReason, RequestId, Submit, Timing, TokenLogprob
from loractl.server.engine.text import TextStream

AdapterKey = tuple[tuple[Digest, float], ...]
"""The adapters of a request with their weights, in the request's order; empty for the bare base."""


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Mutable state of one request, owned by the engine's thread.

    `tokens` is the prompt and what was generated; the first `num_computed` of them have K and V in `blocks`.
    """

    submit: Submit
    tokens: list[int]
    text: TextStream
    adapter_key: AdapterKey
    arrived_at: float = field(default_factory=time.monotonic)
    num_computed: int = 0
    num_cached: int = 0
    """Prompt tokens whose K and V were found in the prefix cache when it first started."""
    blocks: list[int] = field(default_factory=list[int])
    keys: list[BlockKey] = field(default_factory=list[BlockKey])
    """Keys of the full blocks, as far as they have been needed."""
    root: BlockKey = b""
    holds_slots: bool = False
    overtaken: int = 0
    started_at: float | None = None
    first_token_at: float | None = None
    adapter_ready_at: float | None = None
    prompt_logprobs: list[tuple[TokenLogprob, ...]] = field(default_factory=list[tuple[TokenLogprob, ...]])

    @classmethod
    def of(cls, submit: Submit, text: TextStream) -> "Sequence":
        """Start the state of a request."""
        key = tuple((use.digest, use.weight) for use in submit.adapters)
        return cls(
            submit=submit,
            tokens=list(submit.prompt),
            text=text,
            adapter_key=key,
            root=root_key(salt=submit.tenant, adapters=key),
        )

    @property
    def id(self) -> RequestId:
        return self.submit.id

    @property
    def num_prompt(self) -> int:
        return len(self.submit.prompt)

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that still need K and V before the next token can be chosen."""
        return len(self.tokens) - self.num_computed

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some of the prompt's log probabilities are asked for and still missing."""
        asked = self.submit.sampling.num_prompt_logprobs is not None
        return asked and len(self.prompt_logprobs) < self.num_prompt - 1

    @property
    def shown_prompt_logprobs(self) -> tuple[tuple[TokenLogprob, ...], ...] | None:
        """What is reported at the end; None when nobody asked."""
        return None if self.submit.sampling.num_prompt_logprobs is None else tuple(self.prompt_logprobs)

    @property
    def digests(self) -> tuple[Digest, ...]:
        return tuple(digest for digest, _ in self.adapter_key)

    def timing(self, now: float) -> Timing:
        """Split the time since arrival into phases."""
        started = self.started_at if self.started_at is not None else now
        first = self.first_token_at if self.first_token_at is not None else now
        ready = self.adapter_ready_at if self.adapter_ready_at is not None else self.arrived_at
        return Timing(
            queued_s=max(0.0, started - self.arrived_at),
            adapter_wait_s=max(0.0, min(ready, started) - self.arrived_at),
            prefill_s=max(0.0, first - started),
            decode_s=max(0.0, now - first),
        )

    def finished(
        self,
        reason: FinishReason,
        *,
        stop_reason: str | int | None = None,
        tail: bool = True,
        embedding: tuple[float, ...] | None = None,
    ) -> Finished:
        """Its last event; with `tail`, text that was held back for a stop string goes out with it."""
        return Finished(
            id=self.id,
            reason=reason,
            text=self.text.finish() if tail else "",
            stop_reason=stop_reason,
            num_prompt_tokens=self.num_prompt,
            num_cached_tokens=self.num_cached,
            num_output_tokens=self.num_outputs,
            prompt_logprobs=self.shown_prompt_logprobs,
            embedding=embedding,
            timing=self.timing(time.monotonic()),
        )


def fingerprint(submit: Submit) -> bytes:
    """The same for requests of one tenant with the same prompt and adapters."""
    key = tuple((use.digest, use.weight) for use in submit.adapters)
    return child_key(root_key(salt=submit.tenant, adapters=key), submit.prompt)
