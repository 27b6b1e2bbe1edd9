"""The server's log: one JSON object a line with id and digest, and never a prompt, an answer or a key."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loractl.server.access import Access
from loractl.server.run import JsonLines

_SECRET = "swordfish-7281"
_KEY = "sk-some-key-0123456789"


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.setFormatter(JsonLines())

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Everything that any logger says, at every level."""
    handler, root, server = _Lines(), logging.getLogger(), logging.getLogger("loractl")
    levels = root.level, server.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    server.setLevel(logging.DEBUG)
    yield handler.lines
    root.removeHandler(handler)
    root.setLevel(levels[0])
    server.setLevel(levels[1])


async def _everything_wrong_and_right(live: Any) -> None:
    """Requests with a secret in every place that a client can put one."""
    headers = {"authorization": f"Bearer {_KEY}", "x-request-id": _SECRET}
    turn = [{"role": "user", "content": _SECRET}]
    bodies: list[tuple[str, Any]] = [
        ("/v1/completions", {"model": "cats", "prompt": _SECRET, "max_tokens": 30}),
        ("/v1/completions", {"model": "cats", "prompt": _SECRET, "max_tokens": 30, "stream": True}),
        ("/v1/chat/completions", {"model": "tiny", "messages": turn, "max_tokens": 30, "user": _SECRET}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": _SECRET, "content": _SECRET}]}),
        ("/v1/chat/completions", {"model": "tiny", "messages": turn, _SECRET: 1}),
        ("/v1/chat/completions", {"model": _SECRET, "messages": turn}),
        ("/v1/completions", {"model": "cats", "prompt": _SECRET * 2000}),
        ("/v1/completions", {"model": "cats", "prompt": "x", "stop": [_SECRET], "metadata": _SECRET}),
        ("/tokenize", {"prompt": _SECRET}),
        (f"/v1/{_SECRET}", {}),
    ]
    for path, body in bodies:
        await live.http.post(path, json=body, headers=headers)
    await live.http.post("/v1/completions", content=f'{{"prompt": "{_SECRET}'.encode(), headers=headers)
    await live.http.get("/v1/models", headers={"authorization": f"Bearer {_SECRET}-{_SECRET}"})
    live.engine.raise_in_step = RuntimeError("a broken step")
    await live.http.post("/v1/completions", json={"model": "tiny", "prompt": _SECRET}, headers=headers)


async def test_no_prompt_answer_or_key_is_ever_logged(start_server: Any, tmp_path: Path, log: list[str]) -> None:
    (tmp_path / "keys").write_text(f"{_KEY} blue\n")
    live = await start_server(access=Access.from_file(tmp_path / "keys"))
    await _everything_wrong_and_right(live)
    own = [line for line in log if '"loractl' in line]
    assert len(own) > 12
    assert "a broken step" in "".join(own)
    for line in own:
        assert _SECRET not in line
        assert _KEY not in line


async def test_line_of_a_request_names_its_id_and_digest(live: Any, log: list[str]) -> None:
    body = {"model": "cats", "prompt": "x", "max_tokens": 2}
    answer = await live.http.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
    lines = [json.loads(line) for line in log if '"loractl.server.access"' in line]
    (line,) = [line for line in lines if line["path"] == "/v1/completions"]
    assert answer.headers["x-request-id"] == line["request_id"] != "mine"
    assert (line["adapter"], line["status"], line["method"]) == (answer.headers["x-loractl-adapter"], 200, "POST")
    assert {"at", "level", "logger", "message", "seconds"} <= set(line)
