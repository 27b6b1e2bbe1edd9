"""The official `openai` client is the oracle: every feature, as a user of it meets it."""

from typing import Any

import openai
import pytest

HELLO: list[Any] = [{"role": "user", "content": "the quick brown fox"}]


async def test_chat_answers_with_usage_and_reason(live: Any) -> None:
    reply = await live.openai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=7)
    choice = reply.choices[0]
    assert reply.object == "chat.completion"
    assert choice.finish_reason == "length"
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 7
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 7
    rendered = live.serving.prompts.tokenizer.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
    expected = live.serving.prompts.tokenizer.encode(rendered, add_special_tokens=False)
    assert live.engine.submitted[0].prompt == tuple(expected)


async def test_chat_stream_carries_the_same_text_as_the_whole_answer(live: Any) -> None:
    whole = await live.openai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=20)
    stream = await live.openai.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


async def test_stream_without_usage_never_mentions_it(live: Any) -> None:
    body = await live.http.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": HELLO, "max_tokens": 3, "stream": True}
    )
    assert "usage" not in body.text
    assert body.text.endswith("data: [DONE]\n\n")


async def test_adapter_is_chosen_by_model_and_named_in_the_header(live: Any) -> None:
    raw = await live.openai.chat.completions.with_raw_response.create(model="cats", messages=HELLO, max_tokens=30)
    digest = live.serving.source.local["cats"].digest
    assert raw.headers["x-loractl-adapter"] == digest
    assert raw.headers["x-request-id"].startswith("req_")
    assert raw.parse().choices[0].message.content.startswith(f"<{digest[7:15]}>")
    assert raw.parse().model == "cats"


async def test_choices_have_an_index_each_and_prompts_are_counted_once(live: Any) -> None:
    reply = await live.openai.completions.create(model="tiny", prompt=["a film", "a fox"], n=2, max_tokens=4, seed=5)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    prompts = {submit.prompt for submit in live.engine.submitted}
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == sum(len(prompt) for prompt in prompts)
    assert reply.usage.completion_tokens == 16
    assert [submit.sampling.seed for submit in live.engine.submitted] == [5, 6, 5, 6]


async def test_stop_string_ends_the_answer_and_is_left_out(live: Any) -> None:
    reply = await live.openai.completions.create(model="tiny", prompt="a quick brown fox", max_tokens=50, stop=["fox"])
    assert reply.choices[0].text == "a quick brown "
    assert reply.choices[0].finish_reason == "stop"


async def test_chat_logprobs_have_tokens_bytes_and_alternatives(live: Any) -> None:
    reply = await live.openai.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=3, logprobs=True, top_logprobs=2
    )
    content = reply.choices[0].logprobs.content
    assert len(content) == 3
    assert all(len(item.top_logprobs) == 2 for item in content)
    text = b"".join(bytes(item.bytes) for item in content)
    assert text.decode() == "".join(item.token for item in content)


async def test_completion_logprobs_have_offsets(live: Any) -> None:
    reply = await live.openai.completions.create(model="tiny", prompt="a film", max_tokens=3, logprobs=2)
    logprobs = reply.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 3
    assert "".join(logprobs.tokens) == reply.choices[0].text
    assert logprobs.text_offset[0] == 0


async def test_echo_puts_the_prompt_before_the_answer(live: Any) -> None:
    reply = await live.openai.completions.create(model="tiny", prompt="a film", max_tokens=2, echo=True)
    assert reply.choices[0].text.startswith("a film")


async def test_token_ids_are_a_prompt(live: Any) -> None:
    await live.openai.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=1)
    assert live.engine.submitted[0].prompt == (5, 6, 7)


async def test_sampling_reaches_the_engine_as_it_was_asked(live: Any) -> None:
    await live.openai.completions.create(
        model="tiny",
        prompt="x",
        max_tokens=9,
        temperature=0.3,
        top_p=0.8,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"7": 3},
        seed=11,
        user="somebody",
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "ignore_eos": True},
    )
    sampling = live.engine.submitted[0].sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature) == (9, 2, 0.3)
    assert (sampling.top_p, sampling.top_k, sampling.min_p) == (0.8, 5, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -0.5, 1.2)
    assert (dict(sampling.logit_bias), sampling.seed, sampling.ignore_eos) == ({7: 3.0}, 11, True)


async def test_response_format_becomes_a_constraint(live: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    await live.openai.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_tokens=2,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    constraint = live.engine.submitted[0].sampling.constraint
    assert constraint.kind == "json_schema"
    assert '"integer"' in constraint.value


async def test_weighted_adapters_reach_the_engine(live: Any) -> None:
    mix = [{"name": "cats", "weight": 0.7}, {"name": "dogs", "weight": 0.3}]
    await live.openai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2, extra_body={"adapters": mix})
    assert [use.weight for use in live.engine.submitted[0].adapters] == [0.7, 0.3]


async def test_models_lists_base_and_adapters_with_their_parent(live: Any) -> None:
    models = {model.id: model for model in (await live.openai.models.list()).data}
    assert set(models) == {"tiny", "cats", "dogs"}
    assert models["cats"].model_extra["parent"] == "tiny"
    assert (await live.openai.models.retrieve("dogs")).id == "dogs"


async def test_tokenize_and_detokenize_are_inverse(live: Any) -> None:
    tokens = (await live.http.post("/tokenize", json={"prompt": "a quick fox"})).json()["tokens"]
    text = (await live.http.post("/detokenize", json={"tokens": tokens})).json()["prompt"]
    assert text == "a quick fox"


async def test_unknown_adapter_is_model_not_found(live: Any) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await live.openai.chat.completions.create(model="team/nobody", messages=HELLO)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


async def test_failure_before_the_first_token_is_a_status_also_for_streams(live: Any) -> None:
    live.engine.max_queue = 0
    with pytest.raises(openai.RateLimitError) as caught:
        await live.openai.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    assert caught.value.response.headers["retry-after"] == "2"
