"""What README says of the API, each line proved by the official `openai` client on the real engine with a tiny base.

Run as a program, it writes the table into README.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from openai import AsyncOpenAI

from live_server import real_server
from loractl.adapters.digest import folder_digest
from tiny_models import make_adapter
from tool_base import QUESTION, WEATHER, make_tool_base

README = Path(__file__).parents[2] / "README.md"
COUNT: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"enum": [1, 2]}},
    "required": ["n"],
    "additionalProperties": False,
}
BEGIN, END = "<!-- features: begin -->", "<!-- features: end -->"


@dataclass
class Api:
    """One server and its official client."""

    openai: AsyncOpenAI
    http: httpx.AsyncClient
    folders: dict[str, Path]

    async def chat(self, model: str = "tools", **options: Any) -> Any:
        asked: dict[str, Any] = {"messages": QUESTION, "max_tokens": 8, "temperature": 0}
        return await self.openai.chat.completions.create(model=model, **(asked | options))

    async def text(self, model: str = "tools", **options: Any) -> Any:
        asked: dict[str, Any] = {"prompt": "the quick brown fox", "max_tokens": 8, "temperature": 0}
        return await self.openai.completions.create(model=model, **(asked | options))


Proof = Callable[[Api], Awaitable[None]]
FEATURES: list[tuple[str, str, Proof]] = []


def feature(title: str, how: str) -> Callable[[Proof], Proof]:
    """One line of the table, proved by the function below it."""

    def note(proof: Proof) -> Proof:
        FEATURES.append((title, how, proof))
        return proof

    return note


@feature("Chat, whole", "`chat.completions.create`, usage counted as the tokenizer counts")
async def _(api: Api) -> None:
    reply = await api.chat()
    assert reply.choices[0].message.role == "assistant"
    counted = (await api.http.post("/tokenize", json={"messages": QUESTION})).json()["count"]
    assert reply.usage.prompt_tokens == counted
    assert reply.usage.completion_tokens <= 8


@feature("Streams, `stream_options.include_usage`", "the pieces together are the whole answer; usage comes last")
async def _(api: Api) -> None:
    whole = await api.chat(extra_body={"ignore_eos": True})
    stream = await api.chat(stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True})
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 8


@feature("Plain completions", "text, token ids, or lists of them; `echo`")
async def _(api: Api) -> None:
    assert (await api.text(echo=True)).choices[0].text.startswith("the quick brown fox")
    ids = (await api.http.post("/tokenize", json={"prompt": "the quick brown fox"})).json()["tokens"]
    assert (await api.text(prompt=ids)).choices[0].text == (await api.text()).choices[0].text
    assert len((await api.text(prompt=["a", "b"])).choices) == 2


@feature("Adapter by `model`", "`team/name[@revision]`, a local name, or the base; header `x-loractl-adapter`")
async def _(api: Api) -> None:
    texts = set()
    for name in ("tools", "a1", "a2"):
        raw = await api.openai.completions.with_raw_response.create(
            model=name, prompt="the fox", max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
        )
        texts.add(raw.parse().choices[0].text)
        assert raw.headers["x-loractl-adapter"] == ("base" if name == "tools" else folder_digest(api.folders[name]))
    assert len(texts) == 3


@feature("`adapters: [{name, weight}]`", "a weighted sum of adapters without a merge; weight 1 and 0 is the one alone")
async def _(api: Api) -> None:
    alone = await api.text("a1", extra_body={"ignore_eos": True})
    mix = [{"name": "a1", "weight": 1.0}, {"name": "a2", "weight": 0.0}]
    mixed = await api.text(extra_body={"adapters": mix, "ignore_eos": True})
    assert mixed.choices[0].text == alone.choices[0].text


@feature("`n`", "choices with an index each; the prompt is counted once")
async def _(api: Api) -> None:
    reply = await api.chat(n=3, temperature=1.0, seed=1)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert reply.usage.prompt_tokens == (await api.chat()).usage.prompt_tokens


@feature("`seed`", "the same seed, the same answer; another seed, another")
async def _(api: Api) -> None:
    hot: dict[str, Any] = {"temperature": 1.5, "max_tokens": 20, "extra_body": {"ignore_eos": True}}
    texts = [(await api.text(seed=seed, **hot)).choices[0].text for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


@feature("`temperature`, `top_p`, `top_k`, `min_p`", "`top_k` 1 is greedy at any temperature")
async def _(api: Api) -> None:
    greedy = (await api.text()).choices[0].text
    assert (await api.text(temperature=2.0, top_p=0.9, extra_body={"top_k": 1})).choices[0].text == greedy
    assert (await api.text(temperature=0.01, extra_body={"min_p": 1.0})).choices[0].text == greedy


@feature("`logprobs`, `top_logprobs`", "both formats; the chosen token is the likeliest when greedy")
async def _(api: Api) -> None:
    content = (await api.chat(logprobs=True, top_logprobs=3)).choices[0].logprobs.content
    assert all(item.logprob == max(top.logprob for top in item.top_logprobs) for item in content)
    assert len(content[0].top_logprobs) == 3
    logprobs = (await api.text(logprobs=2)).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.top_logprobs) == len(logprobs.text_offset)


@feature("`logit_bias`, penalties", "a bias of 100 forces a token, a bias of -100 forbids it")
async def _(api: Api) -> None:
    token = (await api.http.post("/tokenize", json={"prompt": "z"})).json()["tokens"][0]
    assert (await api.text(logit_bias={token: 100}, max_tokens=4)).choices[0].text == "zzzz"
    greedy = (await api.text(logprobs=0, max_tokens=1)).choices[0].logprobs.tokens[0]
    first = (await api.http.post("/tokenize", json={"prompt": greedy})).json()["tokens"][0]
    assert (await api.text(logit_bias={first: -100}, max_tokens=1)).choices[0].text != greedy
    punished = await api.text(max_tokens=40, presence_penalty=2, frequency_penalty=2, extra_body={"ignore_eos": True})
    freely = await api.text(max_tokens=40, extra_body={"ignore_eos": True})
    assert len(set(punished.choices[0].text)) > len(set(freely.choices[0].text))


@feature("`stop`, `stop_token_ids`", "a stop string ends the answer and is left out")
async def _(api: Api) -> None:
    whole = (await api.text(max_tokens=30, extra_body={"ignore_eos": True})).choices[0].text
    middle = whole[len(whole) // 2]
    reply = await api.text(max_tokens=30, stop=[middle], extra_body={"ignore_eos": True})
    assert reply.choices[0].text == whole[: whole.index(middle)]
    assert reply.choices[0].finish_reason == "stop"


@feature("`max_completion_tokens`, `max_tokens`", "the newer name wins")
async def _(api: Api) -> None:
    reply = await api.chat(max_completion_tokens=3, extra_body={"ignore_eos": True})
    assert reply.usage.completion_tokens == 3
    assert reply.choices[0].finish_reason == "length"


@feature("`user`, `metadata`, `store`, `service_tier`", "taken, and of no effect on the answer")
async def _(api: Api) -> None:
    named = await api.chat(user="somebody", metadata={"team": "blue"}, store=False, service_tier="auto")
    assert named.choices[0].message == (await api.chat()).choices[0].message


@feature(
    "`response_format` json_object, json_schema", "the answer parses and validates; what cannot be held to is refused"
)
async def _(api: Api) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}
    closed = schema | {"additionalProperties": False}
    asked: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "x", "schema": closed, "strict": True}}
    ways: list[dict[str, Any]] = [
        {"response_format": asked},
        {"extra_body": {"structured_outputs": {"json": closed}}},
    ]
    for options in ways:
        reply = await api.chat(max_tokens=120, temperature=1.5, n=3, **options)
        for choice in reply.choices:
            jsonschema.validate(json.loads(choice.message.content), closed)
    free = await api.chat(max_tokens=4, response_format={"type": "json_object"})
    assert free.choices[0].message.content.lstrip().startswith("{")
    asked["json_schema"]["schema"] = {"type": "array", "uniqueItems": True}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as refused:
        await api.chat(response_format=asked)
    assert refused.value.param == "response_format.json_schema.schema"


@feature("`structured_outputs`, `guided_*`: json, regex, choice", "vLLM's fields, newer and older, for chats and texts")
async def _(api: Api) -> None:
    for extra in ({"structured_outputs": {"choice": ["left", "right"]}}, {"guided_choice": ["left", "right"]}):
        assert (await api.text(extra_body=extra)).choices[0].text in {"left", "right"}
    for spelled in ({"structured_outputs": {"regex": "[a-c]{3}"}}, {"guided_regex": "[a-c]{3}"}):
        assert set((await api.chat(extra_body=spelled)).choices[0].message.content) <= set("abc")
    assert (await api.text(extra_body={"guided_json": '{"const": 7}'})).choices[0].text == "7"


@feature("Tools, `tool_choice` auto", "rendered by the base's template; Hermes/Qwen, Llama 3 JSON and Mistral are read")
async def _(api: Api) -> None:
    reply = await api.chat(tools=[WEATHER], max_tokens=80)
    (call,) = reply.choices[0].message.tool_calls
    assert reply.choices[0].finish_reason == "tool_calls"
    assert reply.choices[0].message.content is None
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Bern"})


@feature("Tools, streamed", "name first, then the arguments bit by bit")
async def _(api: Api) -> None:
    stream = await api.chat(tools=[WEATHER], max_tokens=80, stream=True)
    chunks = [chunk.choices[0] async for chunk in stream]
    parts = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert parts[0].function.name == "get_weather"
    assert parts[0].id
    assert len(parts) > 2
    assert json.loads("".join(part.function.arguments or "" for part in parts)) == {"city": "Bern"}
    assert chunks[-1].finish_reason == "tool_calls"


@feature(
    "Tools, `tool_choice` required, named, none",
    "the call is begun for the model and held to the schema, or no tool is shown",
)
async def _(api: Api) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        reply = await api.chat(tools=[WEATHER], tool_choice=choice, max_tokens=80)
        assert reply.choices[0].message.tool_calls[0].function.name == "get_weather"
    # Hot, this base would write anything: two tools, and arguments that it never saw.
    tools = [WEATHER, {"type": "function", "function": {"name": "count", "strict": True, "parameters": COUNT}}]
    named = {"type": "function", "function": {"name": "count"}}
    for choice in ("required", named):
        reply = await api.chat(tools=tools, tool_choice=choice, max_tokens=90, temperature=2.0, seed=3)
        (call,) = reply.choices[0].message.tool_calls
        if call.function.name == "count":
            jsonschema.validate(json.loads(call.function.arguments), COUNT)
    odd = COUNT | {"not": {"required": ["m"]}}
    with pytest.raises(openai.BadRequestError, match="not"):
        tools[1]["function"]["parameters"] = odd
        await api.chat(tools=tools[1:], tool_choice=named)
    reply = await api.chat(tools=[WEATHER], tool_choice="none")
    assert reply.choices[0].message.tool_calls is None
    assert reply.usage.prompt_tokens == (await api.chat()).usage.prompt_tokens


@feature("Tool results", "`assistant` turns with `tool_calls` and `tool` turns go through the template")
async def _(api: Api) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bern"}'}}
    turns = [*QUESTION, {"role": "assistant", "tool_calls": [call]}]
    turns.append({"role": "tool", "tool_call_id": "call_1", "content": "sunny"})
    longer = await api.chat(messages=turns)
    assert longer.usage.prompt_tokens > (await api.chat()).usage.prompt_tokens


@feature(
    "Embeddings", "the last token's hidden state, with the adapter, of length 1; as numbers or base64, many in a batch"
)
async def _(api: Api) -> None:
    asked: dict[str, Any] = {"input": ["the quick brown fox", "a lazy dog"], "encoding_format": "float"}
    numbers = await api.openai.embeddings.create(model="a1", **asked)
    coded = await api.openai.embeddings.create(model="a1", input=asked["input"])  # the client asks for base64
    base = await api.openai.embeddings.create(model="tools", **asked)
    for one, same, other in zip(numbers.data, coded.data, base.data, strict=True):
        assert one.embedding == pytest.approx(same.embedding, abs=1e-6)
        assert one.embedding != pytest.approx(other.embedding, abs=1e-3)
        assert sum(value * value for value in one.embedding) == pytest.approx(1, abs=1e-3)
    assert [one.index for one in numbers.data] == [0, 1]
    counted = [(await api.http.post("/tokenize", json={"prompt": text})).json()["count"] for text in asked["input"]]
    assert numbers.usage.prompt_tokens == sum(counted)
    with pytest.raises(openai.BadRequestError) as wrong:
        await api.openai.embeddings.create(model="a1", dimensions=3, **asked)
    assert wrong.value.param == "dimensions"


@feature("`/v1/models`", "the base and the adapters that this key may use, with `parent`, `root` and digest")
async def _(api: Api) -> None:
    models = {model.id: model for model in (await api.openai.models.list()).data}
    assert set(models) == {"tools", "a1", "a2"}
    facts = models["a1"].model_extra or {}
    assert (facts["parent"], facts["root"]) == ("tools", "a1")
    assert (await api.openai.models.retrieve("a2")).id == "a2"


@feature("`/tokenize`, `/detokenize`", "vLLM's routes, for texts and for chats")
async def _(api: Api) -> None:
    tokens = (await api.http.post("/tokenize", json={"prompt": "a quick fox"})).json()["tokens"]
    assert (await api.http.post("/detokenize", json={"tokens": tokens})).json()["prompt"] == "a quick fox"


@feature("Errors", "OpenAI's shape; 400 names the field, an unknown adapter is `model_not_found`")
async def _(api: Api) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        await api.chat(temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as unknown:
        await api.chat(extra_body={"temprature": 1})
    assert unknown.value.param == "temprature"
    with pytest.raises(openai.NotFoundError) as missing:
        await api.chat("team/nobody")
    assert missing.value.code == "model_not_found"


@feature("Headers", "`x-request-id`, `x-loractl-adapter`, `x-loractl-queue-ms`, `x-loractl-load-ms`")
async def _(api: Api) -> None:
    for stream in (False, True):
        raw = await api.http.post(
            "/v1/completions", json={"model": "a1", "prompt": "x", "max_tokens": 2, "stream": stream}
        )
        assert raw.headers["x-request-id"].startswith("req_")
        assert raw.headers["x-loractl-adapter"] == folder_digest(api.folders["a1"])
        assert float(raw.headers["x-loractl-queue-ms"]) >= 0
        assert float(raw.headers["x-loractl-load-ms"]) >= 0


def table() -> str:
    """The features as a Markdown table."""
    rows = [f"| {title} | {how} |" for title, how, _ in FEATURES]
    return "\n".join([BEGIN, "| feature | what a test proves |", "|---|---|", *rows, END])


def test_readme_shows_the_features_that_are_proved() -> None:
    assert table() in README.read_text(), "run: PYTHONPATH=tests/support python tests/server/test_openai_features.py"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("features")
    base = make_tool_base(root / "tools")
    return {"tools": base} | {f"a{n}": make_adapter(base, root / f"a{n}", seed=n) for n in (1, 2)}


@pytest.fixture
async def api(folders: dict[str, Path]) -> AsyncIterator[Api]:
    adapters = {name: folder for name, folder in folders.items() if name != "tools"}
    async with real_server(folders["tools"], adapters=adapters) as live:
        client = AsyncOpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0, timeout=60)
        async with client, httpx.AsyncClient(base_url=live.url, timeout=60) as http:
            yield Api(client, http, folders)


@pytest.mark.slow
@pytest.mark.parametrize(("title", "proof"), [pytest.param(title, proof, id=title) for title, _, proof in FEATURES])
async def test_feature_is_there(api: Api, title: str, proof: Proof) -> None:
    assert title
    await asyncio.wait_for(proof(api), 120)


if __name__ == "__main__":
    text = README.read_text()
    before, rest = text.split(BEGIN)
    README.write_text(before + table() + rest.split(END)[1])
