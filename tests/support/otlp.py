"""An OTLP receiver that keeps the spans it gets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent import futures

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector(pb_grpc.TraceServiceServicer):
    """`spans`: (service name, span) in the order of their arrival."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.spans: list[tuple[str, Span]] = []

    def Export(
        self, request: pb.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> pb.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            name = next(
                attribute.value.string_value
                for attribute in resource.resource.attributes
                if attribute.key == "service.name"
            )
            for scope in resource.scope_spans:
                self.spans.extend((name, span) for span in scope.spans)
        return pb.ExportTraceServiceResponse()

    def of_trace(self, trace_id: bytes) -> dict[str, list[Span]]:
        """Spans of one trace by service."""
        found: dict[str, list[Span]] = {}
        for service, span in self.spans:
            if span.trace_id == trace_id:
                found.setdefault(service, []).append(span)
        return found


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    receiver = Collector()
    pb_grpc.add_TraceServiceServicer_to_server(receiver, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    receiver.endpoint = f"http://127.0.0.1:{port}"
    server.start()
    try:
        yield receiver
    finally:
        server.stop(grace=1).wait(timeout=5)
