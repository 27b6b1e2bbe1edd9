"""Spans of a request, as a collector gets them: below the caller's, one phase after the other, without a prompt."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from loractl.adapters.errors import UsageError
from loractl.server.tracing import Tracing

_CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
_SECRET = "the password is swordfish"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Tracing:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider)


def _by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


@pytest.mark.parametrize("stream", [False, True])
async def test_phases_follow_each_other_below_the_callers_span(
    start_server: Any, tracing: Tracing, exporter: InMemorySpanExporter, *, stream: bool
) -> None:
    live = await start_server(tracing=tracing)
    body = {"model": "cats", "messages": [{"role": "user", "content": _SECRET}], "max_tokens": 5, "stream": stream}
    answer = await live.http.post("/v1/chat/completions", json=body, headers={"traceparent": _CALLER})
    assert answer.status_code == 200
    spans = _by_name(exporter)
    assert set(spans) == {"chat cats", "queue", "load", "prefill", "decode"}
    root = spans["chat cats"]
    assert root.parent is not None
    assert root.context is not None
    assert f"00-{root.context.trace_id:032x}-{root.parent.span_id:016x}-01" == _CALLER
    parents = {name: span.parent.span_id for name, span in spans.items() if span.parent is not None}
    assert parents["queue"] == parents["prefill"] == parents["decode"] == root.context.span_id
    assert spans["queue"].context is not None
    assert parents["load"] == spans["queue"].context.span_id
    assert spans["queue"].end_time == spans["prefill"].start_time
    assert spans["prefill"].end_time == spans["decode"].start_time
    facts = dict(root.attributes or {})
    assert facts["gen_ai.request.model"] == "cats"
    assert facts["gen_ai.usage.output_tokens"] == 5
    assert facts["gen_ai.response.finish_reasons"] == ("length",)
    assert facts["loractl.adapter.digests"] == (answer.headers["x-loractl-adapter"],)
    assert facts["loractl.request_id"] == answer.headers["x-request-id"]
    assert facts["http.response.status_code"] == 200
    assert "swordfish" not in "".join(span.to_json() for span in exporter.get_finished_spans())


async def test_failure_is_an_error_and_other_routes_have_no_span(
    start_server: Any, tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    live = await start_server(tracing=tracing)
    await live.http.get("/v1/models")
    await live.http.get("/healthz")
    assert exporter.get_finished_spans() == ()
    live.engine.raise_in_step = RuntimeError("broken")
    await live.http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
    await live.http.post("/v1/completions", json={"model": "nobody", "prompt": "x"}, headers={"traceparent": "junk"})
    failed, refused = exporter.get_finished_spans()
    assert (failed.status.status_code, dict(failed.attributes or {})["error.type"]) == (
        StatusCode.ERROR,
        "ENGINE_FAILURE",
    )
    assert (refused.status.status_code, refused.parent) == (StatusCode.UNSET, None)


class _Collector(BaseHTTPRequestHandler):
    """Takes OTLP over HTTP, as a real collector does."""

    names: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        message = ExportTraceServiceRequest.FromString(body)
        type(self).names += [
            span.name for one in message.resource_spans for scope in one.scope_spans for span in scope.spans
        ]
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        del format, args


@pytest.fixture
def collector() -> Iterator[tuple[str, list[str]]]:
    _Collector.names = []
    server = HTTPServer(("127.0.0.1", 0), _Collector)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", _Collector.names
    server.shutdown()
    server.server_close()


async def test_standard_variables_send_spans_to_a_collector(
    start_server: Any, collector: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, names = collector
    assert Tracing.from_environment() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    tracing = Tracing.from_environment()
    assert tracing is not None
    live = await start_server(tracing=tracing)
    await live.http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 2})
    tracing.close()
    assert "text_completion tiny" in names


def test_variables_that_ask_for_no_or_for_an_unknown_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "pigeon")
    with pytest.raises(UsageError, match="pigeon"):
        Tracing.from_environment()
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert Tracing.from_environment() is None


def test_server_needs_no_opentelemetry() -> None:
    script = (
        "import sys; sys.modules['opentelemetry'] = None; sys.modules['opentelemetry.sdk'] = None\n"
        "import os; os.environ['OTEL_TRACES_EXPORTER'] = 'console'\n"
        "import loractl.server.app; from loractl.server.tracing import Tracing; print(Tracing.from_environment())"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "None"
    assert "loractl[otel]" in ran.stderr
