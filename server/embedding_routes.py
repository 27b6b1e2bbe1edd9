"""`/v1/embeddings`: what the base, with an adapter, makes of a text's last token. One engine request a text.

A causal base that nobody trained for it embeds poorly; an adapter that was trained for it does not.
"""

import base64
import contextlib
import struct
from collections.abc import Sequence
from typing import Any

import msgspec
from litestar import Request, post
from litestar.handlers import HTTPRouteHandler
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp

from loractl.adapters.errors import ContextExceeded
from loractl.server.access import Key
from loractl.server.completion_routes import counted, served_headers
from loractl.server.engine.messages import Failed, Finished, Sampling, Submit
from loractl.server.generation import ServedAdapter, refuse_unsupported
from loractl.server.http_input import read_body
from loractl.server.openai_errors import decode_body
from loractl.server.openai_replies import EmbeddingItem, EmbeddingReply, EmbeddingUsage
from loractl.server.openai_wire import EmbeddingRequest
from loractl.server.prompt_input import read_prompts
from loractl.server.serving import Serving
from loractl.server.stream import ClientGone, unless_gone
from loractl.server.watch import Watch


def embedding_routes(serving: Serving) -> Sequence[HTTPRouteHandler]:
    """The handler, bound to one server."""

    @post("/v1/embeddings", status_code=200)
    async def embed(request: Request[Any, Any, Any]) -> ASGIApp:
        key = await serving.access.check(request.headers.get("authorization"))
        body = decode_body(await read_body(request, serving.settings), EmbeddingRequest)
        serving.check_open()
        refuse_unsupported(body)
        with contextlib.ExitStack() as stack:
            stack.enter_context(counted(serving, key))
            adapters = await serving.adapters_of(body, key)
            bookings = [key, *serving.bookings(adapters)]
            for booking in bookings[1:]:
                stack.enter_context(serving.quotas.admit(booking))
            submits = await _submits(serving, body, bookings, adapters)
            watch = serving.open(submits, adapters=adapters, is_stream=False)
            try:
                content = await unless_gone(request.receive, _answer(watch, body))
            except ClientGone:
                serving.metrics.disconnects.labels(watch.stage).inc()
                serving.bridge.cancel(watch.ticket)
                return ASGIResponse(body=b"", status_code=499)
            except BaseException:
                serving.bridge.cancel(watch.ticket)
                raise
            return ASGIResponse(body=content, media_type="application/json", headers=served_headers(adapters))

    return [embed]


async def _submits(
    serving: Serving, body: EmbeddingRequest, bookings: Sequence[Key], adapters: Sequence[ServedAdapter]
) -> list[Submit]:
    prompts = await read_prompts(serving, body.input, field="input")
    window = serving.limits.max_model_len
    longest = max(len(prompt) for prompt in prompts)
    if longest >= window:
        raise ContextExceeded(f"a text of {longest} tokens is longer than the window of {window}", field="input")
    for booking in bookings:
        serving.quotas.take_tokens(booking, sum(len(prompt) for prompt in prompts))
    caller = serving.caller(bookings[0])
    return [
        Submit(
            id=serving.bridge.new_id(),
            prompt=prompt,
            sampling=Sampling(max_tokens=1, temperature=0.0),
            adapters=tuple(adapter.use for adapter in adapters),
            tenant=caller.tenant,
            weight=caller.weight,
            deadline_s=serving.deadline_s(),
            wants_embedding=True,
        )
        for prompt in prompts
    ]


async def _answer(watch: Watch, body: EmbeddingRequest) -> bytes:
    vectors: dict[int, tuple[float, ...]] = {}
    num_tokens = 0
    async for batch in watch.events():
        for event in batch:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished) and event.embedding is not None:
                num_tokens += event.num_prompt_tokens
                vectors[watch.index[event.id]] = event.embedding
    items = [
        EmbeddingItem(index=index, embedding=_written(vector, body.encoding_format))
        for index, vector in sorted(vectors.items())
    ]
    usage = EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
    return msgspec.json.encode(EmbeddingReply(data=items, model=body.model, usage=usage))


def _written(vector: Sequence[float], encoding: str) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return list(vector)
