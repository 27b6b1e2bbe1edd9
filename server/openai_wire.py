"""What clients may send to `/v1`: closed structs with every limit in their types. Knows no HTTP and no engine.

Unknown fields are refused, as OpenAI does; the fields beyond OpenAI's are vLLM's, with its names.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

MAX_CHOICES = 8
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_TOKENS = 1 << 20

Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
MaxTokens = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(gt=0, le=1)]
Unit = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Meta(gt=0, le=10)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
TokenId = Annotated[int, Meta(ge=0, le=1 << 31)]
Seed = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
StopText = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[StopText], Meta(max_length=MAX_STOPS)]
Expression = Annotated[str, Meta(min_length=1, max_length=4096)]
Alternatives = Annotated[list[Annotated[str, Meta(min_length=1, max_length=1024)]], Meta(min_length=1, max_length=256)]
Name = Annotated[str, Meta(min_length=1, max_length=512)]
Label = Annotated[str, Meta(max_length=512)]


class Closed(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A part of a request in which a misspelt field is an error."""


class StreamOptions(Closed):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class AdapterWeight(Closed):
    """One part of a weighted sum of adapters."""

    name: Name
    weight: Annotated[float, Meta(ge=-4, le=4)] = 1.0


class JsonSchemaFormat(Closed):
    name: Annotated[str, Meta(min_length=1, max_length=64)]
    description: Annotated[str, Meta(max_length=4096)] | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(Closed):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Closed):
    """vLLM's way to ask for an output form; at most one of the three. A schema may come as its text."""

    regex: Expression | None = None
    choice: Alternatives | None = None
    json: dict[str, Any] | str | None = None


class Common(Closed, kw_only=True):
    """What chats and plain completions share."""

    model: Name
    adapters: Annotated[list[AdapterWeight], Meta(min_length=1, max_length=8)] | None = None
    n: Choices | None = None
    max_tokens: MaxTokens | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 20)] | None = None
    """0 and -1 mean all tokens."""
    min_p: Unit | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=1024)] | None = None
    seed: Seed | None = None
    stop: StopText | Stops | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=64)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    structured_outputs: StructuredOutputs | None = None
    # vLLM's earlier names of the same.
    guided_json: dict[str, Any] | str | None = None
    guided_regex: Expression | None = None
    guided_choice: Alternatives | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Label | None = None


class TextPart(msgspec.Struct):
    """One part of a message; a type other than text is refused with its name."""

    type: str
    text: str | None = None


class FunctionCall(Closed):
    name: Annotated[str, Meta(min_length=1, max_length=64)]
    arguments: str


class ToolCall(Closed):
    id: Label
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | None = None


class Message(msgspec.Struct, kw_only=True):
    """One turn of a chat. Extra fields that clients echo back (refusal, annotations ...) are let pass."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Label | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=128)] | None = None
    tool_call_id: Label | None = None


def num_chars(message: Message) -> int:
    """Characters of text in one turn."""
    content = message.content or ""
    return len(content) if isinstance(content, str) else sum(len(part.text or "") for part in content)


class FunctionSpec(Closed):
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Annotated[str, Meta(max_length=16384)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Closed):
    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(Closed):
    name: Annotated[str, Meta(min_length=1, max_length=64)]


class NamedTool(Closed):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Common, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    # Accepted because clients send them; they change nothing that is computed here.
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | None = None
    store: bool | None = None
    service_tier: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    # Known to OpenAI and not served here: refused by name unless absent or null.
    audio: msgspec.Raw | None = None
    function_call: msgspec.Raw | None = None
    functions: msgspec.Raw | None = None
    modalities: msgspec.Raw | None = None
    moderation: msgspec.Raw | None = None
    prediction: msgspec.Raw | None = None
    reasoning_effort: msgspec.Raw | None = None
    verbosity: msgspec.Raw | None = None
    web_search_options: msgspec.Raw | None = None


class CompletionRequest(Common, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[TokenId]]
    """A text, token ids, or a list of either; checked further where it is tokenized."""
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False
    response_format: ResponseFormat | None = None
    best_of: msgspec.Raw | None = None
    suffix: msgspec.Raw | None = None


UNSUPPORTED_FIELDS: tuple[str, ...] = (
    "audio",
    "function_call",
    "functions",
    "modalities",
    "moderation",
    "prediction",
    "reasoning_effort",
    "verbosity",
    "web_search_options",
    "best_of",
    "suffix",
    "dimensions",
)


class EmbeddingRequest(Closed):
    """POST /v1/embeddings."""

    model: Name
    input: str | list[str | int | list[TokenId]]
    """A text, token ids, or a list of either; checked further where it is tokenized."""
    adapters: Annotated[list[AdapterWeight], Meta(min_length=1, max_length=8)] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: Label | None = None
    dimensions: msgspec.Raw | None = None


class TokenizeRequest(Closed):
    """POST /tokenize: a text, or messages through the base's chat template."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Closed):
    """POST /detokenize."""

    tokens: Annotated[list[TokenId], Meta(max_length=1 << 20)]
    model: Name | None = None
