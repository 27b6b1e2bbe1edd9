"""The routes that generate: chats and plain completions, whole or streamed. They translate; the engine decides."""

import asyncio
import contextlib
import dataclasses
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from litestar import Request, post
from litestar.handlers import HTTPRouteHandler
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp

from loractl.adapters.errors import BadRequest, LoractlError, UsageError
from loractl.server.access import EVERYBODY, Key
from loractl.server.engine.messages import Constraint, Sampling
from loractl.server.generation import (
    Asked,
    ServedAdapter,
    chat_sampling,
    completion_sampling,
    refuse_unsupported,
)
from loractl.server.http_input import read_body
from loractl.server.openai_errors import decode_body
from loractl.server.openai_wire import ChatRequest, Common, CompletionRequest, num_chars
from loractl.server.prompt_input import read_prompts
from loractl.server.replies import ChatWriter, Frame, TextWriter, Writer, streamed_answer, whole_answer
from loractl.server.serving import Serving
from loractl.server.stream import ClientGone, EventStream, SlowReader, unless_gone
from loractl.server.tool_plan import ToolPlan, plan_tools
from loractl.server.tool_replies import ToolWriter
from loractl.server.tracing import RequestTrace
from loractl.server.watch import Watch

TRACE = "loractl_trace"
"""Where the outermost layer puts a request's trace in its scope."""

_REASONS = {
    "model_not_found": "adapter_not_found",
    "OVERLOADED": "queue_full",
    "RATE_LIMITED": "rate_limit",
    "CONTEXT_LENGTH_EXCEEDED": "too_long",
    "REPO_NOT_FOUND": "adapter_not_found",
    "REVISION_NOT_FOUND": "adapter_not_found",
    "UNREACHABLE": "hub_down",
    "BASE_MISMATCH": "adapter_invalid",
    "ADAPTER_INVALID": "adapter_invalid",
}


def completion_routes(serving: Serving) -> Sequence[HTTPRouteHandler]:
    """The two handlers, bound to one server."""

    @post("/v1/chat/completions", status_code=200)
    async def chat(request: Request[Any, Any, Any]) -> ASGIApp:
        return await _Generation(serving, request).answer_chat()

    @post("/v1/completions", status_code=200)
    async def complete(request: Request[Any, Any, Any]) -> ASGIApp:
        return await _Generation(serving, request).answer_completion()

    return [chat, complete]


class _Generation:
    """One HTTP request that generates, from its body to its answer."""

    def __init__(self, serving: Serving, request: Request[Any, Any, Any]) -> None:
        self._serving = serving
        self._request = request
        self._key = EVERYBODY
        self._bookings: list[Key] = []

    async def answer_chat(self) -> ASGIApp:
        serving = self._serving
        self._key = await serving.access.check(self._request.headers.get("authorization"))
        body = decode_body(await read_body(self._request, serving.settings), ChatRequest)
        self._check(body)
        plan = plan_tools(body, serving.prompts.tokenizer)
        serving.check_length(sum(num_chars(message) for message in body.messages), field="messages")
        with counted(serving, self._key):
            adapters = await serving.adapters_of(body, self._key)
            prompt = await serving.prompts.from_chat(
                body.messages,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                tools=plan.tools if plan is not None else (),
                opening=plan.opening if plan is not None else "",
            )
            sampling = chat_sampling(body, num_prompt_tokens=len(prompt), limits=serving.limits)
            sampling = await self._constrained(sampling, plan)
            asked = self._asked(body, sampling, adapters)
            frame = self._frame(body, asked, "chatcmpl", with_logprobs=bool(body.logprobs))
            writer = ChatWriter() if plan is None else ToolWriter(plan)
            return await self._answer(body, asked, [prompt], frame, writer)

    async def answer_completion(self) -> ASGIApp:
        serving = self._serving
        self._key = await serving.access.check(self._request.headers.get("authorization"))
        body = decode_body(await read_body(self._request, serving.settings), CompletionRequest)
        self._check(body)
        with counted(serving, self._key):
            adapters = await serving.adapters_of(body, self._key)
            prompts = await read_prompts(serving, body.prompt, field="prompt", num_choices=body.n or 1)
            longest = max(len(prompt) for prompt in prompts)
            sampling = completion_sampling(body, num_prompt_tokens=longest, limits=serving.limits)
            sampling = await self._constrained(sampling, None)
            asked = self._asked(body, sampling, adapters)
            echo: tuple[tuple[str, int], ...] = ()
            if body.echo:
                echo = tuple([(await serving.prompts.to_text(prompt), prompt[0]) for prompt in prompts])
            frame = self._frame(body, asked, "cmpl", with_logprobs=body.logprobs is not None, echo=echo)
            return await self._answer(body, asked, prompts, frame, TextWriter())

    def _check(self, body: Common) -> None:
        self._serving.check_open()
        refuse_unsupported(body)
        if body.stream_options is not None and not body.stream:
            raise BadRequest("stream_options needs stream", hint="set stream to true", field="stream_options")

    async def _constrained(self, sampling: Sampling, plan: ToolPlan | None) -> Sampling:
        """Compile, off the event loop, what the output must match; a forced call must match its tool's schema."""
        constraint = sampling.constraint
        if plan is not None and plan.grammar:
            constraint = Constraint(kind="grammar", value=plan.grammar, field="tools")
        elif plan is not None and constraint is not None:
            raise BadRequest(
                f"{constraint.field} excludes tools that the model may call or not",
                hint='force a call by tool_choice, or set tool_choice to "none"',
                field=constraint.field,
            )
        if constraint is None:
            return sampling
        try:
            await asyncio.to_thread(self._serving.bridge.engine.check_constraint, constraint)
        except BadRequest:
            if plan is None or plan.is_strict:
                raise
            constraint = None  # a tool's schema is a promise of the caller's only where it says `strict`
        return dataclasses.replace(sampling, constraint=constraint)

    def _asked(self, body: Common, sampling: Sampling, adapters: tuple[ServedAdapter, ...]) -> Asked:
        return Asked(
            sampling=sampling,
            num_choices=body.n or 1,
            adapters=adapters,
            caller=self._serving.caller(self._key),
            priority=body.priority,
            deadline_s=self._serving.deadline_s(),
        )

    def _frame(
        self, body: Common, asked: Asked, prefix: str, *, with_logprobs: bool, echo: tuple[tuple[str, int], ...] = ()
    ) -> Frame:
        return Frame(
            id=f"{prefix}-{uuid.uuid4().hex}",
            model=body.model,
            prompts=self._serving.prompts,
            num_choices=asked.num_choices,
            with_logprobs=with_logprobs,
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
            echo=echo,
            with_prompt_logprobs=body.prompt_logprobs is not None,
        )

    async def _answer(
        self, body: Common, asked: Asked, prompts: list[tuple[int, ...]], frame: Frame, writer: Writer
    ) -> ASGIApp:
        with contextlib.ExitStack() as stack:
            self._bookings = [self._key, *self._serving.bookings(asked.adapters)]
            for booking in self._bookings[1:]:
                stack.enter_context(self._serving.quotas.admit(booking))
            return await self._submit(body, asked, prompts, frame, writer)

    async def _submit(
        self, body: Common, asked: Asked, prompts: list[tuple[int, ...]], frame: Frame, writer: Writer
    ) -> ASGIApp:
        serving, receive = self._serving, self._request.receive
        ids = [serving.bridge.new_id() for _ in range(len(prompts) * asked.num_choices)]
        num_booked = sum(len(prompt) for prompt in prompts) + len(ids) * asked.sampling.max_tokens
        for booking in self._bookings:
            serving.quotas.take_tokens(booking, num_booked)
        trace: RequestTrace | None = self._request.scope["state"].get(TRACE)
        if trace is not None:
            trace.asked(body.model, adapters=[each.found.digest for each in asked.adapters])
        submits = asked.submits(prompts, ids)
        watch = serving.open(submits, adapters=asked.adapters, is_stream=bool(body.stream), trace=trace)
        headers = served_headers(asked.adapters)
        try:
            if not body.stream:
                content = await unless_gone(receive, whole_answer(watch, frame, writer))
                return _ready_made(content, headers | _waited(watch))
            chunks = streamed_answer(watch, frame, writer)
            # Until the first token, a failure is still an HTTP status.
            first = await unless_gone(receive, anext(chunks))
        except ClientGone:
            self._left(watch)
            return _ready_made(b"", {}, status=499)
        except BaseException:
            serving.bridge.cancel(watch.ticket)
            raise
        serving.num_requests += 1
        for booking in self._bookings:
            serving.quotas.hold(booking)
        return EventStream(
            _chained(first, chunks),
            headers=headers | _waited(watch),
            on_close=lambda error: self._stream_closed(watch, error),
            write_timeout_s=serving.settings.write_timeout_s,
        )

    def _stream_closed(self, watch: Watch, error: BaseException | None) -> None:
        self._serving.num_requests -= 1
        for booking in self._bookings:
            self._serving.quotas.release(booking)
        if isinstance(error, SlowReader):
            self._serving.metrics.slow_readers.inc()
        if isinstance(error, ClientGone):
            self._left(watch)
        elif not watch.ticket.is_ended:
            self._serving.bridge.cancel(watch.ticket)

    def _left(self, watch: Watch) -> None:
        self._serving.metrics.disconnects.labels(watch.stage).inc()
        self._serving.metrics.aborted_tokens.labels(watch.stage).inc(watch.num_tokens)
        self._serving.bridge.cancel(watch.ticket)


@contextlib.contextmanager
def counted(serving: Serving, key: Key) -> Iterator[None]:
    """Book one request against its key while the context is open, and count it when it is refused."""
    serving.num_requests += 1
    try:
        with serving.quotas.admit(key):
            yield
    except LoractlError as error:
        if isinstance(error, UsageError) and error.code == "BAD_REQUEST":
            raise
        serving.metrics.rejected.labels(_REASONS.get(error.code, error.code.lower())).inc()
        raise
    finally:
        serving.num_requests -= 1


async def _chained(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in rest:
        yield chunk


def served_headers(adapters: Sequence[ServedAdapter]) -> dict[str, str]:
    """Whose answer it is: the digests, and the hub's versions where there are any."""
    headers = {"x-loractl-adapter": "+".join(each.found.digest for each in adapters) or "base"}
    versions = [each.found.version or "-" for each in adapters]
    return headers | {"x-loractl-version": "+".join(versions)} if any(v != "-" for v in versions) else headers


def _waited(watch: Watch) -> dict[str, str]:
    """How long the first sequence waited, for its turn and for its adapter, in milliseconds."""
    timing = watch.timing
    if timing is None:
        return {}
    queued_s = max(0.0, timing.queued_s - timing.adapter_wait_s)
    return {"x-loractl-queue-ms": f"{queued_s * 1e3:.1f}", "x-loractl-load-ms": f"{timing.adapter_wait_s * 1e3:.1f}"}


def _ready_made(content: bytes, headers: dict[str, str], *, status: int = 200) -> ASGIApp:
    return ASGIResponse(body=content, status_code=status, media_type="application/json", headers=headers)
