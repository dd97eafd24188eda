from __future__ import annotations

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from fastserve.common.telemetry import (
    configure_logging,
    configure_tracing,
    context_from,
    traceparent_of,
)

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_traceparent_round_trip() -> None:
    tracer = TracerProvider().get_tracer("test")
    span = tracer.start_span("child", context=context_from({"traceparent": PARENT}))
    made = traceparent_of(span)
    span.end()
    assert made.startswith("00-0af7651916cd43dd8448eb211c80319c-")
    assert made != PARENT


def test_no_traceparent_without_a_valid_span() -> None:
    assert traceparent_of(trace.INVALID_SPAN) == ""


def test_tracing_is_off_without_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    assert configure_tracing("test") is None


def test_unknown_log_level_is_refused() -> None:
    with pytest.raises(ValueError, match="'loud' is not one of debug, info, warning, error"):
        configure_logging("test", "loud")
