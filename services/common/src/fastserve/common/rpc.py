"""gRPC plumbing: channels and servers with the same limits and keepalive everywhere.

Addresses are `host:port` or `unix:/path/to/socket`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from pydantic import Field

from fastserve.common.errors import StartupError
from fastserve.common.tls import Tls, TlsSettings

_MAX_MESSAGE = 64 * 1024 * 1024  # a prompt of a million tokens fits

_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    ("grpc.max_send_message_length", _MAX_MESSAGE),
    # A peer whose machine is gone sends no FIN: find out within seconds.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
]
_CHANNEL_OPTIONS = [
    *_OPTIONS,
    # Reconnect quickly: peers restart in seconds, and nobody waits for them but us.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Channels to the same address share a subchannel otherwise, and with it its back-off.
    ("grpc.use_local_subchannel_pool", 1),
]
_SERVER_OPTIONS = [*_OPTIONS, ("grpc.so_reuseport", 0)]

LIVE: Final = "live"  # in the health service: SERVING as long as the event loop turns


class RpcSettings(TlsSettings):
    """Of a service with a gRPC server."""

    health_listen: str = Field(
        default="",
        description="host:port of a plain gRPC server with the health service and nothing else, "
        "for probes that know no TLS (default: none)",
    )


def channel(address: str, tls: Tls | None = None) -> aio.Channel:
    """A channel to `address`: with TLS if there is a certificate, but to a Unix socket plain."""
    if tls is None or address.startswith("unix:"):
        return aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
    options: list[tuple[str, int | str]] = [*_CHANNEL_OPTIONS]
    if tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return aio.secure_channel(address, tls.client(), options=options)


class GrpcServer:
    """An aio server with the standard health service.

    Add servicers to `.server`, then `start()`. The overall status ("") follows `set_serving`; that
    of `LIVE` is SERVING from the start on.
    """

    def __init__(self, interceptors: Sequence[aio.ServerInterceptor] = ()) -> None:
        self.server = aio.server(interceptors=interceptors, options=_SERVER_OPTIONS)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        self._probed: aio.Server | None = None

    async def start(self, address: str, tls: Tls | None = None) -> str:
        """Bind and start; the address with the port filled in. Unix sockets are plain.

        Raises `StartupError` if the address cannot be bound.
        """
        await self.set_serving(True, (LIVE,))
        return await _start(self.server, address, tls)

    async def start_health(self, address: str) -> str:
        """Show the health of this server on a second address, plain and without anything else.

        Returns and raises as `start`.
        """
        self._probed = aio.server(options=_SERVER_OPTIONS)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._probed)
        return await _start(self._probed, address, None)

    async def set_serving(self, serving: bool, services: Iterable[str] = ("",)) -> None:
        """Publish readiness through the gRPC health protocol."""
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for service in services:
            await self._health.set(service, status)

    async def stop(self, grace: float) -> None:
        """Refuse new calls, let running ones end for `grace` seconds, then cut them."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace)
        if self._probed is not None:
            await self._probed.stop(0)


async def _start(server: aio.Server, address: str, tls: Tls | None) -> str:
    unix = address.startswith("unix:")
    _remove_stale_socket(address)
    try:
        if tls is None or unix:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, tls.server())
    except RuntimeError as error:
        raise StartupError(f"cannot listen on {address}: {error}") from error
    await server.start()
    return address if unix else f"{address.rpartition(':')[0]}:{port}"


def _remove_stale_socket(address: str) -> None:
    """A socket file left by a killed process would make the bind fail."""
    if address.startswith("unix:"):
        Path(address.removeprefix("unix:")).unlink(missing_ok=True)


def is_connection_loss(error: grpc.RpcError) -> bool:
    """Whether a call ended because the peer went away, rather than because it refused."""
    return isinstance(error, aio.AioRpcError) and error.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
    )
