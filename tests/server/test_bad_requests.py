"""Whatever a client sends wrong, it gets OpenAI's error shape, a fitting status, and the field by name."""

import json
from typing import Any

import httpx
import pytest

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "tiny", "prompt": "hi"}


def _error(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert {"message", "type", "param", "code"} <= set(body["error"])
    assert body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("path", "change", "field"),
    [
        ("chat/completions", {"temprature": 1}, "temprature"),
        ("chat/completions", {"temperature": "warm"}, "temperature"),
        ("chat/completions", {"temperature": 2.5}, "temperature"),
        ("chat/completions", {"n": 0}, "n"),
        ("chat/completions", {"n": 1000000}, "n"),
        ("chat/completions", {"max_tokens": 0}, "max_tokens"),
        ("chat/completions", {"max_tokens": 100000}, "max_tokens"),
        ("chat/completions", {"max_completion_tokens": 100000}, "max_completion_tokens"),
        ("chat/completions", {"top_logprobs": 3}, "top_logprobs"),
        ("chat/completions", {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            "messages[0].content[0].type",
        ),
        ("chat/completions", {"stop": ["x" * 257]}, "stop[0]"),
        ("chat/completions", {"stop": ["x"] * 17}, "stop"),
        ("chat/completions", {"logit_bias": {"7": 101}}, "logit_bias[...]"),
        ("chat/completions", {"logit_bias": {"99999": 1}}, "logit_bias"),
        ("chat/completions", {"audio": {"voice": "x"}}, "audio"),
        ("chat/completions", {"chat_template": "{{ x }}"}, "chat_template"),
        ("chat/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("chat/completions", {"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        (
            "chat/completions",
            {"tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]},
            "tools",
        ),
        ("chat/completions", {"tool_choice": "required"}, "tool_choice"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": ["x", 3]}, "prompt"),
        ("completions", {"prompt": [384]}, "prompt"),
        ("completions", {"prompt": "fox " * 600}, "prompt"),
        ("completions", {"prompt": ["x"] * 65}, "prompt"),
        ("completions", {"logprobs": 21}, "logprobs"),
        ("completions", {"suffix": "x"}, "suffix"),
        ("completions", {"model": None}, "model"),
        ("completions", {"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ],
)
async def test_wrong_field_is_named(live: Any, path: str, change: dict[str, Any], field: str) -> None:
    body = (CHAT if path.startswith("chat") else TEXT) | change
    response = await live.http.post(f"/v1/{path}", json=body)
    assert response.status_code == 400, response.text
    assert _error(response)["param"] == field
    assert not live.engine.submitted


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'"text"', b"[" * 100_000, b'{"model": "tiny", "prompt": "\\ud800"}'],
)
async def test_body_that_is_not_such_json_is_400(live: Any, content: bytes) -> None:
    response = await live.http.post("/v1/completions", content=content)
    assert response.status_code == 400, response.text
    _error(response)


async def test_deeply_nested_schema_is_400(live: Any) -> None:
    schema = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    body = json.dumps(CHAT).encode()[:-1] + b', "structured_outputs": {"json": ' + schema + b"}}"
    response = await live.http.post("/v1/chat/completions", content=body)
    assert response.status_code == 400
    _error(response)


async def test_missing_field_is_named(live: Any) -> None:
    response = await live.http.post("/v1/completions", json={"prompt": "x"})
    assert (response.status_code, _error(response)["param"]) == (400, "model")


async def test_prompt_beyond_the_window_has_openais_code(live: Any) -> None:
    response = await live.http.post("/v1/completions", json=TEXT | {"prompt": "fox " * 600})
    assert _error(response)["code"] == "context_length_exceeded"


async def test_body_beyond_the_limit_is_413(start_server: Any) -> None:
    live = await start_server(max_body_bytes=1000)
    response = await live.http.post("/v1/completions", json=TEXT | {"prompt": "x" * 2000})
    assert response.status_code == 413
    assert _error(response)["code"] == "body_too_large"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)])
async def test_wrong_path_or_method_has_the_same_shape(live: Any, method: str, path: str, status: int) -> None:
    response = await live.http.request(method, path)
    assert response.status_code == status
    _error(response)


@pytest.mark.parametrize(
    ("path", "said"),
    [("/v1/messages", "Anthropic"), ("/v1/responses", "Responses API"), ("/v1/images/generations", "images")],
)
async def test_api_that_is_not_served_says_so(live: Any, path: str, said: str) -> None:
    response = await live.http.post(path, json={"model": "tiny", "max_tokens": 9, "messages": []})
    assert response.status_code == 404
    assert said in _error(response)["hint"]


async def test_bug_is_500_without_details(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(live.serving.bridge, "open", broken)
    response = await live.http.post("/v1/completions", json=TEXT)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert _error(response)["type"] == "server_error"
