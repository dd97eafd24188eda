"""`python -m fastserve.kv_offload`: the sidecar process."""

from __future__ import annotations

import asyncio
import contextlib
import sys

from fastserve.common.lifecycle import announce_ready, run_service
from fastserve.common.rpc import GrpcServer
from fastserve.common.telemetry import serve_metrics
from fastserve.kv_offload.disk import DiskFile
from fastserve.kv_offload.metrics import Metrics
from fastserve.kv_offload.owners import Owners
from fastserve.kv_offload.peer_auth import PeerAuth, TokenCheck, load_auth
from fastserve.kv_offload.peer_client import PeerClient
from fastserve.kv_offload.peer_service import KvPeers
from fastserve.kv_offload.pool import PREFIX
from fastserve.kv_offload.scratch import remove_stale
from fastserve.kv_offload.service import KvOffload
from fastserve.kv_offload.settings import Settings, parse_size
from fastserve.proto.v1 import kv_offload_pb2_grpc as pb_grpc

_POLL_S = 0.05


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Serve until `stop` is set."""
    remove_stale(settings.pool_dir, PREFIX)
    auth = load_auth(settings)
    metrics = Metrics()
    async with contextlib.AsyncExitStack() as stack:
        disk = None
        if settings.disk_path is not None and settings.disk_size is not None:
            disk = DiskFile(settings.disk_path, parse_size(settings.disk_size))
            stack.callback(disk.close)
        owners = Owners(settings, metrics, disk)
        stack.push_async_callback(owners.close)
        info: dict[str, str | int] = {}
        if settings.peer_listen:
            peers = _peer_server(owners, auth, metrics)
            info["peer_address"] = await peers.start(settings.peer_listen, auth.tls)
            stack.push_async_callback(peers.stop, settings.shutdown_timeout)
        reached = settings.peer_address or str(info.get("peer_address", ""))
        server = GrpcServer()
        service = KvOffload(settings, owners, PeerClient(auth, metrics), metrics, reached)
        pb_grpc.add_KvOffloadServiceServicer_to_server(service, server.server)
        info["address"] = await server.start(settings.listen)
        stack.push_async_callback(server.stop, settings.shutdown_timeout)
        if settings.health_listen:
            info["health_address"] = await server.start_health(settings.health_listen)
        info["metrics_port"] = serve_metrics(
            metrics.registry, settings.metrics_host, settings.metrics_port
        )
        collector = asyncio.create_task(_collect(owners, settings.owner_lease))
        stack.callback(collector.cancel)
        await server.set_serving(True)
        announce_ready(settings, **info)
        await _until(stop, collector)
        await _outlive(owners, settings.shutdown_timeout)


def _peer_server(owners: Owners, auth: PeerAuth, metrics: Metrics) -> GrpcServer:
    """The listener of other pods: none of the worker's calls are there."""
    server = GrpcServer([TokenCheck(auth, metrics)])
    pb_grpc.add_KvPeerServiceServicer_to_server(KvPeers(owners, metrics), server.server)
    return server


async def _collect(owners: Owners, lease: float) -> None:
    """Look for leases that have ended, often enough to be late by a quarter of one."""
    while True:
        await asyncio.sleep(lease / 4)
        await owners.collect()


async def _outlive(owners: Owners, timeout: float) -> None:
    """Workers that were told to stop with us move their jobs first, for which they need us."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            while owners.in_use:  # noqa: ASYNC110  # once, at the end
                await asyncio.sleep(_POLL_S)


async def _until(stop: asyncio.Event, collector: asyncio.Task[None]) -> None:
    """Wait for `stop`. A failure of the collector ends the process."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({stopping, collector}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if collector.done():
        collector.result()


if __name__ == "__main__":
    sys.exit(run_service("kv-offload", Settings, serve))
