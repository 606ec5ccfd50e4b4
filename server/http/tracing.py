"""OpenTelemetry traces: a span for each request, and below it the phases of each completion.

Spans are made when a request has ended, from times that the call has anyway, so tracing costs
nothing while it generates. The extra `otel` has the packages. OpenTelemetry's own variables, such
as OTEL_EXPORTER_OTLP_ENDPOINT, say where spans go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from engine.errors import ConfigError
from engine.version import VERSION
from server.http.calls import Call, Finished

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

SERVICE: Final = "ambidex"
_QUIET: Final = frozenset({"/metrics", "/health", "/health/live", "/health/ready"})


def otlp_provider() -> TracerProvider:
    """A provider that exports spans in batches over OTLP/HTTP.

    Raises:
        ConfigError: the packages of the extra are not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            "traces (AMBIDEX_TRACES) need OpenTelemetry: pip install 'ambidex[otel]'"
        ) from error
    resource = Resource.create({"service.name": SERVICE, "service.version": VERSION})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class Tracing:
    """Makes the spans of requests that have ended."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer(SERVICE, VERSION)
        self._propagator = TraceContextTextMapPropagator()

    def record(self, call: Call) -> None:
        """The spans of `call`, below the client's own where it sent a `traceparent`."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        if call.path in _QUIET:
            return
        carrier = {"traceparent": call.traceparent} if call.traceparent else {}
        span = self._tracer.start_span(
            f"{call.method} {call.route or 'unknown'}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=_nanoseconds(call.started),
            attributes=_attributes(call),
        )
        below = set_span_in_context(span)
        for finished in call.finished:
            self._phases(call, finished, below)
        if call.status >= 500 or call.outcome in ("error", "timeout"):
            span.set_status(StatusCode.ERROR, call.outcome)
        span.end(_nanoseconds(call.started + call.seconds))

    def _phases(self, call: Call, finished: Finished, below: Context) -> None:
        """The spans of queue, prefill and decode, as far as a completion came."""
        usage, end = finished.usage, finished.ended
        admitted = end - usage.inference_seconds
        phases = [("queue", admitted - usage.queue_seconds, admitted)]
        if finished.first_token is not None:
            phases += [("prefill", admitted, finished.first_token)]
            phases += [("decode", finished.first_token, end)]
        for name, first, last in phases:
            span = self._tracer.start_span(
                name, context=below, start_time=_nanoseconds(call.started + max(0.0, first))
            )
            span.end(_nanoseconds(call.started + max(0.0, first, last)))

    def stop(self) -> None:
        """Export the spans that were not sent yet."""
        self._provider.shutdown()


def _attributes(call: Call) -> dict[str, str | int | float]:
    """The attributes of a request's span, by OpenTelemetry's names where it has them."""
    known: dict[str, str | int | float | None] = {
        "http.request.method": call.method,
        "http.route": call.route,
        "http.response.status_code": call.status,
        "client.address": call.client,
        "ambidex.request_id": call.request_id,
        "ambidex.key": call.key.name if call.key else None,
        "ambidex.outcome": call.outcome,
    }
    if call.finished:
        usages = call.usages
        known["gen_ai.usage.input_tokens"] = sum(u.prompt_tokens for u in usages)
        known["gen_ai.usage.output_tokens"] = call.generated_tokens
        known["ambidex.experts_activated"] = sum(u.experts_activated for u in usages)
        known["ambidex.experts_available"] = sum(u.experts_available for u in usages)
    return {name: value for name, value in known.items() if value is not None}


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
