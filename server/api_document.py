"""The OpenAPI document of the server, made from the structs that its routes read and write. Decides nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import msgspec
from litestar import Response, get
from litestar.handlers import HTTPRouteHandler

from loractl.server.openai_replies import (
    ChatChunk,
    ChatReply,
    DetokenizeReply,
    EmbeddingReply,
    ErrorReply,
    ModelCard,
    ModelList,
    TextReply,
    TokenizeReply,
)
from loractl.server.openai_wire import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from loractl.server.operator_routes import Done, Drained, Health, NamedAdapter, Status

DOCUMENT_PATH = "/openapi.json"
_SCHEMAS = "#/components/schemas/"
_TEXT = "text/plain"

_ERRORS = {
    400: "A field that is wrong or cannot be served; `error.param` names it.",
    401: "No API key, or one that is not known here.",
    403: "The key has no admin right.",
    404: "No such model, or one that this key may not use.",
    413: "The body is too large.",
    429: "Too many requests; `Retry-After` says when to ask again.",
    503: "Starting, draining, or the hub does not answer; `Retry-After` says when to ask again.",
    "4XX": "Any other refusal.",
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One route: what it reads, what it writes, and who may call it."""

    method: Literal["get", "post"]
    path: str
    summary: str
    body: type[msgspec.Struct] | None = None
    reply: type[msgspec.Struct] | str = _TEXT
    """A struct that is sent as JSON, or the type of what is no JSON."""
    chunk: type[msgspec.Struct] | None = None
    """What each event of the stream holds, where the body may ask for one."""
    is_public: bool = False
    is_away: bool = False
    """503 says that the answer is no, in the shape of a yes."""


def _adapter_call(action: str, summary: str) -> Operation:
    return Operation("post", f"/admin/adapters/{action}", summary, NamedAdapter, Done)


OPERATIONS: Sequence[Operation] = (
    Operation("post", "/v1/chat/completions", "Answer a chat.", ChatRequest, ChatReply, chunk=ChatChunk),
    Operation("post", "/v1/completions", "Complete texts.", CompletionRequest, TextReply, chunk=TextReply),
    Operation("post", "/v1/embeddings", "Embed texts by their last token.", EmbeddingRequest, EmbeddingReply),
    Operation("get", "/v1/models", "The base and the adapters that this key may use.", reply=ModelList),
    Operation("get", "/v1/models/{model}", "One of them, or any adapter that the hub has.", reply=ModelCard),
    Operation("post", "/tokenize", "Token ids of a text or a chat.", TokenizeRequest, TokenizeReply),
    Operation("post", "/detokenize", "The text of token ids.", DetokenizeRequest, DetokenizeReply),
    Operation("get", "/admin/status", "Residency, queues and speed.", reply=Status),
    _adapter_call("load", "Fetch an adapter and bring it to the device."),
    _adapter_call("prefetch", "Fetch an adapter to the disk."),
    _adapter_call("pin", "Keep an adapter on the device."),
    _adapter_call("unpin", "Let a pinned adapter make room for others again."),
    _adapter_call("unload", "Take an adapter off the device."),
    Operation("post", "/admin/drain", "Take nothing new; answer when all that ran has ended.", reply=Drained),
    *(
        Operation("get", path, "Whether a restart would not help.", reply=Health, is_public=True, is_away=True)
        for path in ("/health/live", "/healthz")
    ),
    *(
        Operation("get", path, "Whether a request would be served.", reply=Health, is_public=True, is_away=True)
        for path in ("/health/ready", "/readyz")
    ),
    Operation("get", "/health/startup", "Whether loading is over.", reply=Health, is_public=True, is_away=True),
    Operation("get", "/metrics", "The page for Prometheus.", is_public=True),
    Operation("get", "/metrics/routing", "Queues and resident adapters, for routers.", is_public=True),
    Operation("get", "/", "The playground.", reply="text/html", is_public=True),
)


def document() -> dict[str, Any]:
    """The whole document, as OpenAPI 3.1 has it."""
    structs = {each for op in OPERATIONS for each in (op.body, op.reply, op.chunk) if isinstance(each, type)}
    _, shapes = msgspec.json.schema_components({*structs, ErrorReply}, ref_template=_SCHEMAS + "{name}")
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "loractl server",
            "version": version("loractl"),
            "description": "OpenAI's API, where `model` names an adapter; fields beyond OpenAI's are vLLM's.",
        },
        "paths": paths,
        "components": {
            "schemas": dict(sorted(shapes.items())),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def document_routes() -> Sequence[HTTPRouteHandler]:
    """The document, for everybody: it names nobody."""
    content = msgspec.json.encode(document())

    @get(DOCUMENT_PATH)
    async def openapi() -> Response[bytes]:
        return Response(content, media_type="application/json")

    return [openapi]


def _described(operation: Operation) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": f"{operation.method}{operation.path.replace('/', '_')}",
        "summary": operation.summary,
        "security": [] if operation.is_public else [{"key": []}, {}],
        "responses": _answers(operation),
    }
    if "{model}" in operation.path:
        found["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    if operation.body is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": _schema(operation.body)}}
    return found


def _answers(operation: Operation) -> dict[str, Any]:
    good: dict[str, Any] = {}
    if isinstance(operation.reply, str):
        good[operation.reply] = {"schema": {"type": "string"}}
    else:
        good["application/json"] = _schema(operation.reply)
    if operation.chunk is not None:
        events = f"Server-sent events: each `data:` holds a {operation.chunk.__name__}, the last one `[DONE]`."
        good["text/event-stream"] = {"schema": {"type": "string", "description": events}}
    answers: dict[str, Any] = {"200": {"description": "Done.", "content": good}}
    if operation.is_away:
        return answers | {"503": {"description": "No.", "content": good}}
    if operation.is_public:
        return answers
    wrong = {"application/json": _schema(ErrorReply)}
    return answers | {str(status): {"description": text, "content": wrong} for status, text in _ERRORS.items()}


def _schema(struct: type[msgspec.Struct]) -> dict[str, Any]:
    return {"schema": {"$ref": _SCHEMAS + struct.__name__}}
