from __future__ import annotations

import socket
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fastserve.common.errors import StartupError
from fastserve.common.rpc import GrpcServer, channel


async def status(address: str) -> int:
    async with channel(address) as connection:
        stub = health_pb2_grpc.HealthStub(connection)
        reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True)
        return int(reply.status)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_health_follows_set_serving(kind: str, tmp_path: Path) -> None:
    server = GrpcServer()
    wanted = "127.0.0.1:0" if kind == "tcp" else f"unix:{tmp_path}/s.sock"
    address = await server.start(wanted)
    assert not address.endswith(":0")
    try:
        await server.set_serving(False)
        assert await status(address) == health_pb2.HealthCheckResponse.NOT_SERVING
        await server.set_serving(True)
        assert await status(address) == health_pb2.HealthCheckResponse.SERVING
    finally:
        await server.stop(0)


async def test_taken_port_is_refused_with_the_address() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{port}"):
            await GrpcServer().start(f"127.0.0.1:{port}")


async def test_socket_file_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    server = GrpcServer()
    address = await server.start(f"unix:{path}")
    try:
        await server.set_serving(True)
        assert await status(address) == health_pb2.HealthCheckResponse.SERVING
    finally:
        await server.stop(0)
