"""What is served, and tokens: `/v1/models`, `/tokenize`, `/detokenize`. Generates nothing."""

from collections.abc import Sequence
from typing import Any

import msgspec
from litestar import Request, Response, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath
from msgspec import UNSET

from loractl.adapters.errors import BadRequest
from loractl.server.access import Key
from loractl.server.http_input import read_body
from loractl.server.openai_errors import decode_body
from loractl.server.openai_replies import DetokenizeReply, ModelCard, ModelList, TokenizeReply
from loractl.server.openai_wire import DetokenizeRequest, TokenizeRequest
from loractl.server.serving import Serving


def model_routes(serving: Serving) -> Sequence[HTTPRouteHandler]:
    """The handlers, bound to one server."""

    @get("/v1/models")
    async def list_models(request: Request[Any, Any, Any]) -> Response[bytes]:
        key = await serving.access.check(request.headers.get("authorization"))
        return _json(ModelList(data=await _cards(serving, key)))

    @get("/v1/models/{model:path}")
    async def show_model(request: Request[Any, Any, Any], model: FromPath[str]) -> Response[bytes]:
        key = await serving.access.check(request.headers.get("authorization"))
        name = model.removeprefix("/")
        for card in await _cards(serving, key):
            if card.id == name:
                return _json(card)
        found = await serving.find(name, key)
        return _json(_adapter_card(serving, found.name, found.digest, root=found.repo_id or found.name))

    @post("/tokenize", status_code=200)
    async def tokenize(request: Request[Any, Any, Any]) -> Response[bytes]:
        key = await serving.access.check(request.headers.get("authorization"))
        body = decode_body(await read_body(request, serving.settings), TokenizeRequest)
        await _check_model(serving, body.model, key)
        if (body.prompt is None) == (body.messages is None):
            raise BadRequest("give either prompt or messages", field="prompt")
        if body.messages is not None:
            tokens = await serving.prompts.from_chat(body.messages, add_generation_prompt=body.add_generation_prompt)
        else:
            tokens = await serving.prompts.from_text(body.prompt or "", add_special_tokens=body.add_special_tokens)
        texts = [serving.prompts.token_text(token) for token in tokens] if body.return_token_strs else UNSET
        window = serving.bridge.engine.max_model_len
        reply = TokenizeReply(count=len(tokens), max_model_len=window, tokens=list(tokens), token_strs=texts)
        return _json(reply)

    @post("/detokenize", status_code=200)
    async def detokenize(request: Request[Any, Any, Any]) -> Response[bytes]:
        key = await serving.access.check(request.headers.get("authorization"))
        body = decode_body(await read_body(request, serving.settings), DetokenizeRequest)
        await _check_model(serving, body.model, key)
        return _json(DetokenizeReply(await serving.prompts.to_text(body.tokens)))

    return [list_models, show_model, tokenize, detokenize]


async def _check_model(serving: Serving, name: str | None, key: Key) -> None:
    """Every adapter of a base shares its tokenizer, so the name matters only in that it must exist."""
    if name is not None and name != serving.settings.base_name:
        await serving.find(name, key)


async def _cards(serving: Serving, key: Key) -> list[ModelCard]:
    """What this key may use of the base, the adapters given at the start, and those of the hub asked for so far."""
    base = ModelCard(
        id=serving.settings.base_name,
        created=serving.started_at,
        owned_by="loractl",
        root=serving.settings.base_name,
        max_model_len=serving.bridge.engine.max_model_len,
        digest=serving.settings.base_fingerprint,
    )
    cards = {base.id: base}
    for name, found in serving.source.local.items():
        if not await serving.access.may_use(key, name):
            continue
        cards[name] = _adapter_card(serving, name, found.digest, root=name)
    for name, resolved in serving.source.known_names():
        if not await serving.access.may_use(key, resolved.repo_id):
            continue
        cards.setdefault(name, _adapter_card(serving, name, resolved.digest, root=resolved.repo_id))
    return list(cards.values())


def _adapter_card(serving: Serving, name: str, digest: str, *, root: str) -> ModelCard:
    stats = serving.bridge.engine.stats()
    level = "device" if any(slot.digest == digest for slot in stats.slots) else None
    if level is None and digest in stats.host_digests:
        level = "host"
    return ModelCard(
        id=name,
        created=serving.started_at,
        owned_by=root.partition("/")[0],
        root=root,
        parent=serving.settings.base_name,
        max_model_len=serving.bridge.engine.max_model_len,
        digest=digest,
        resident=level,
    )


def _json(value: msgspec.Struct) -> Response[bytes]:
    return Response(msgspec.json.encode(value), media_type="application/json")
