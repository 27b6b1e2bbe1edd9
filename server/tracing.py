"""OpenTelemetry spans of the requests that generate: `pip install loractl[otel]`, configured by the standard OTEL_*.

    chat MODEL                 the HTTP request, child of the caller's `traceparent`
      queue                    waiting for a place in the batch
        load                   waiting for the adapter to be resident
      prefill                  from the first step to the first token
      decode                   from the first token to the last

One queue, prefill and decode per sequence. No span holds a prompt or an output. Knows no route and no metric.
"""

import logging
import os
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points, version
from typing import TYPE_CHECKING, Any, Self

from loractl.adapters.errors import UsageError
from loractl.server.engine.messages import Failed, Finished

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

_log = logging.getLogger("loractl.server")

OPERATIONS: Mapping[str, str] = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
"""What the semantic conventions for generative AI call our routes."""


class RequestTrace:
    """The span of one request and those below it, from its first byte to its last."""

    def __init__(self, tracer: Any, span: Any, operation: str) -> None:
        self._tracer = tracer
        self._span = span
        self._operation = operation
        self._submitted_ns = time.time_ns()
        self._num_input = self._num_output = 0
        self._reasons: list[str] = []

    @property
    def trace_id(self) -> str:
        return f"{self._span.get_span_context().trace_id:032x}"

    def asked(self, model: str, *, adapters: Iterable[str]) -> None:
        """Note what is asked for, and that from now on the engine has it."""
        self._submitted_ns = time.time_ns()
        self._span.update_name(f"{self._operation} {model}")
        self._span.set_attribute("gen_ai.request.model", model)
        self._span.set_attribute("loractl.adapter.digests", list(adapters))

    def sequence_ended(self, end: Finished) -> None:
        """Draw the phases of one sequence from its timing."""
        timing, start_ns = end.timing, self._submitted_ns
        self._num_input += end.num_prompt_tokens
        self._num_output += end.num_output_tokens
        self._reasons.append(end.reason)
        queue = self._phase("queue", self._span, start_ns, timing.queued_s)
        if timing.adapter_wait_s > 0:
            self._phase("load", queue, start_ns, timing.adapter_wait_s)
        start_ns += _ns(timing.queued_s)
        self._phase("prefill", self._span, start_ns, timing.prefill_s)
        self._phase("decode", self._span, start_ns + _ns(timing.prefill_s), timing.decode_s)

    def sequence_failed(self, failure: Failed) -> None:
        self._span.set_attribute("error.type", failure.error.code)

    def end(self, status: int, *, request_id: str) -> None:
        """End the request's span; a status of the server's own fault marks it as an error."""
        from opentelemetry.trace import Status, StatusCode

        span = self._span
        span.set_attribute("http.response.status_code", status)
        span.set_attribute("loractl.request_id", request_id)
        if self._reasons:
            span.set_attribute("gen_ai.usage.input_tokens", self._num_input)
            span.set_attribute("gen_ai.usage.output_tokens", self._num_output)
            span.set_attribute("gen_ai.response.finish_reasons", self._reasons)
        if status >= 500 or status == 0:
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def _phase(self, name: str, parent: Any, start_ns: int, seconds: float) -> Any:
        from opentelemetry.trace import set_span_in_context

        span = self._tracer.start_span(name, context=set_span_in_context(parent), start_time=start_ns)
        span.end(end_time=start_ns + _ns(seconds))
        return span


class Tracing:
    """Makes spans and hands them to an exporter, in a thread of its own."""

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("loractl.server", version("loractl"))

    @classmethod
    def from_environment(cls) -> Self | None:
        """What OTEL_* ask for; None when they ask for nothing. Raises UsageError for an exporter that is not there."""
        name = _exporter_name(os.environ)
        if name is None:
            return None
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            _log.warning("OTEL_* ask for traces, and OpenTelemetry is not installed: pip install 'loractl[otel]'")
            return None
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES are read where nothing is given.
        is_named = "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        resource = Resource.create({} if is_named else {"service.name": "loractl-server"})
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(BatchSpanProcessor(_exporter(name)))
        return cls(provider)

    def begin(self, method: str, path: str, headers: Iterable[tuple[bytes, bytes]]) -> RequestTrace | None:
        """Open the span of a request that generates, below the caller's; None for any other route."""
        from opentelemetry import propagate
        from opentelemetry.trace import SpanKind

        operation = OPERATIONS.get(path)
        if operation is None:
            return None
        carrier = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "loractl",
            "http.request.method": method,
            "http.route": path,
        }
        context = propagate.extract(carrier)
        span = self._tracer.start_span(operation, context=context, kind=SpanKind.SERVER, attributes=attributes)
        return RequestTrace(self._tracer, span, operation)

    def close(self) -> None:
        """Send what is left; takes as long as the exporter does."""
        self._provider.shutdown()


def _exporter_name(environment: Mapping[str, str]) -> str | None:
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    has_endpoint = any(
        environment.get(name) for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    )
    # The specification's default is otlp; without any wish a server should not call a collector that is not there.
    name = environment.get("OTEL_TRACES_EXPORTER", "otlp" if has_endpoint else "none").strip()
    if name in {"", "none"}:
        return None
    if name != "otlp":
        return name
    protocol = environment.get(
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", environment.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    )
    return "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"


def _exporter(name: str) -> "SpanExporter":
    found = list(entry_points(group="opentelemetry_traces_exporter", name=name))
    if not found:
        raise UsageError(
            f"OTEL_TRACES_EXPORTER: there is no exporter {name}", hint="install its package, such as 'loractl[otel]'"
        )
    exporter: SpanExporter = found[0].load()()
    return exporter


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
