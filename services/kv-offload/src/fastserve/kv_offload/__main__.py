"""`python -m fastserve.kv_offload`: the sidecar process."""

from __future__ import annotations

import asyncio
import sys

from fastserve.common.lifecycle import announce_ready, run_service
from fastserve.common.rpc import GrpcServer
from fastserve.common.telemetry import serve_metrics
from fastserve.kv_offload.metrics import Metrics
from fastserve.kv_offload.pool import remove_stale
from fastserve.kv_offload.service import KvOffload
from fastserve.kv_offload.settings import Settings
from fastserve.proto.v1 import kv_offload_pb2_grpc as pb_grpc


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Serve until `stop` is set."""
    remove_stale(settings.pool_dir)
    metrics = Metrics()
    service = KvOffload(settings, metrics)
    server = GrpcServer()
    pb_grpc.add_KvOffloadServiceServicer_to_server(service, server.server)
    try:
        address = await server.start(settings.listen)
        metrics_port = serve_metrics(metrics.registry, settings.metrics_host, settings.metrics_port)
        await server.set_serving(True)
        announce_ready(settings, address=address, metrics_port=metrics_port)
        await stop.wait()
        await server.stop(settings.shutdown_timeout)
    finally:
        service.close()


if __name__ == "__main__":
    sys.exit(run_service("kv-offload", Settings, serve))
