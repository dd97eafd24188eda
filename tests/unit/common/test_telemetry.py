from __future__ import annotations

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry, Gauge

from fastserve.common.telemetry import (
    configure_logging,
    configure_tracing,
    context_from,
    serve_metrics,
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


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_names_with_a_colon_reach_prometheus(host: str) -> None:
    """Prometheus asks for OpenMetrics, in which the library would write vllm_."""
    registry = CollectorRegistry()
    Gauge("vllm:num_requests_running", "Rows", registry=registry).set(3)
    port = serve_metrics(registry, host, 0)
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"
    answer = httpx.get(url, headers={"Accept": accept}, timeout=10, trust_env=False)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "\nvllm:num_requests_running 3.0\n" in answer.text


def test_a_taken_metrics_port() -> None:
    port = serve_metrics(CollectorRegistry(), "127.0.0.1", 0)
    with pytest.raises(OSError, match="in use"):
        serve_metrics(CollectorRegistry(), "127.0.0.1", port)
