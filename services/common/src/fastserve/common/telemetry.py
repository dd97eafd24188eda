"""Logs, metrics and traces, set up the same way in every service.

Logs are JSON lines on stderr with the ids of the current trace. Metrics live in one registry per
process, served over HTTP. Traces are exported over OTLP gRPC if `OTEL_EXPORTER_OTLP_ENDPOINT` (or
the traces-only variable) is set; all other `OTEL_*` variables keep their standard meaning, except
that the default sampler is `parentbased_traceidratio` at 0.05.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterable, Mapping
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import structlog
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import CollectorRegistry, make_wsgi_app

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_PROPAGATOR = TraceContextTextMapPropagator()


def _add_trace_ids(
    _: Any, __: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = trace.format_trace_id(context.trace_id)
        event["span_id"] = trace.format_span_id(context.span_id)
    return event


def configure_logging(service: str, level: str) -> None:
    """JSON lines on stderr, for structlog and for the standard library's loggers alike."""
    if level not in _LEVELS:
        raise ValueError(f"log level {level!r} is not one of {', '.join(_LEVELS)}")
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_trace_ids,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.EventRenamer("message"),
                _name_service(service),
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_LEVELS[level])
    # Chatty at info without saying anything an operator acts on.
    for name in ("httpx", "httpcore", "asyncio", "grpc._cython.cygrpc"):
        logging.getLogger(name).setLevel(max(_LEVELS[level], logging.WARNING))


def _name_service(service: str) -> structlog.typing.Processor:
    def add(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event["service"] = service
        return event

    return add


def serve_metrics(registry: CollectorRegistry, host: str, port: int) -> int:
    """Serve `registry` at /metrics in a daemon thread; the bound port is returned.

    Raises OSError when the port is taken.
    """
    app: WSGIApplication = make_wsgi_app(registry)

    def in_text_format(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        # In OpenMetrics, which Prometheus asks for, the library writes vllm_ for vllm:.
        environ.pop("HTTP_ACCEPT", None)
        return app(environ, start_response)

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server_class: type[WSGIServer] = type("_", (_MetricsServer,), {"address_family": family})
    server = make_server(host, port, in_text_format, server_class, _SilentHandler)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server.server_port


class _MetricsServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """A scrape is nothing to log."""


def configure_tracing(service: str, instance: str = "") -> TracerProvider | None:
    """Install the global tracer provider if an OTLP endpoint is configured, else none (no cost).

    Call `shutdown()` on the provider at exit: it flushes what is queued.
    """
    if not (
        os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
        or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    ):
        return None
    os.environ.setdefault("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    if os.environ["OTEL_TRACES_SAMPLER"].endswith("traceidratio"):
        os.environ.setdefault("OTEL_TRACES_SAMPLER_ARG", "0.05")
    attributes = {"service.name": f"fastserve-{service}", "service.namespace": "fastserve"}
    if instance:
        attributes["service.instance.id"] = instance
    provider = TracerProvider(resource=Resource.create(attributes))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return provider


def traceparent_of(span: trace.Span) -> str:
    """W3C traceparent of a span, "" if it is not recording a valid context."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, context=trace.set_span_in_context(span))
    return carrier.get("traceparent", "")


def context_from(headers: Mapping[str, str]) -> Any:
    """OpenTelemetry context named by `traceparent` / `tracestate` headers (lower-case keys)."""
    return _PROPAGATOR.extract(dict(headers))
