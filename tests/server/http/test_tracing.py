"""Traces: one span a request, its phases below it, times that add up; nothing when off."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from engine.errors import ConfigError
from server.http.tracing import Tracing, otlp_provider

if TYPE_CHECKING:
    from tests.server.conftest import Live, Serve

Spans = dict[str, Any]


@pytest.fixture
def traced(serve: Serve) -> Any:
    """A server with traces, and its spans by name once there are as many as expected."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    def spans(count: int) -> Spans:
        deadline = time.monotonic() + 120
        while len(exporter.get_finished_spans()) < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        found = exporter.get_finished_spans()
        assert len(found) == count
        return {span.name: span for span in found}

    with serve(tracing=Tracing(provider), step_seconds=0.002) as live:
        yield live, spans


def test_a_generation_has_a_span_with_its_phases(
    traced: tuple[Live, Callable[[int], Spans]],
) -> None:
    live, spans = traced
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    live.http.get("/health")
    live.http.get("/metrics")  # of which nobody wants traces
    live.http.post(
        "/generate",
        json={"inputs": "hello", "parameters": {"max_new_tokens": 6, "experts": "top_k:2"}},
        headers={"traceparent": f"00-{trace}-{parent}-01", "X-Request-Id": "mine"},
    )
    found = spans(4)
    top = found["POST /generate"]
    assert f"{top.context.trace_id:032x}" == trace
    assert f"{top.parent.span_id:016x}" == parent
    assert top.attributes["ambidex.request_id"] == "mine"
    assert top.attributes["http.response.status_code"] == 200
    assert top.attributes["gen_ai.usage.input_tokens"] == 5
    assert top.attributes["gen_ai.usage.output_tokens"] == 6
    ratio = (
        top.attributes["ambidex.experts_activated"] / top.attributes["ambidex.experts_available"]
    )
    assert ratio == 0.25
    phases = [found[name] for name in ("queue", "prefill", "decode")]
    assert {phase.parent.span_id for phase in phases} == {top.context.span_id}
    times = [t for phase in phases for t in (phase.start_time, phase.end_time)]
    assert times == sorted(times)
    assert top.start_time <= times[0]
    assert times[-1] <= top.end_time
    assert phases[2].end_time - phases[2].start_time >= 5 * 0.002 * 1e9


def test_what_fails_is_marked(traced: tuple[Live, Callable[[int], Spans]]) -> None:
    live, spans = traced
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 4000}}
    headers = {"X-Request-Timeout": "0.1"}
    assert live.http.post("/generate", json=body, headers=headers).status_code == 504
    (span,) = spans(1).values()
    assert not span.status.is_ok
    assert span.attributes["ambidex.outcome"] == "timeout"


def test_without_its_packages_the_setting_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(ConfigError, match=r"ambidex\[otel\]"):
        otlp_provider()


def test_the_exporter_can_be_made() -> None:
    provider = otlp_provider()
    assert provider.resource.attributes["service.name"] == "ambidex"
    provider.shutdown()
