from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fastserve.common.errors import StartupError
from fastserve.common.rpc import LIVE, GrpcServer, channel
from fastserve.common.tls import Tls
from fastserve.proto.v1 import scheduler_pb2, scheduler_pb2_grpc

FILES = Path(__file__).parents[2] / "support" / "tls"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def tls(cert: str, server_name: str = "sidecar.test") -> Tls:
    return Tls(
        cert=(FILES / f"{cert}.crt").read_bytes(),
        key=(FILES / f"{cert}.key").read_bytes(),
        ca=(FILES / "ca.crt").read_bytes(),
        server_name=server_name,
    )


async def status(address: str, tls: Tls | None = None, service: str = "") -> int:
    async with channel(address, tls) as connection:
        stub = health_pb2_grpc.HealthStub(connection)
        request = health_pb2.HealthCheckRequest(service=service)
        reply = await stub.Check(request, timeout=10)
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


async def test_calls_between_services_need_a_certificate_of_the_authority() -> None:
    server = GrpcServer()
    address = await server.start("127.0.0.1:0", tls("peer"))
    try:
        await server.set_serving(True)
        assert await status(address, tls("peer")) == SERVING
        for caller in (None, tls("stranger"), tls("peer", server_name="another.test")):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await status(address, caller)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        await server.stop(0)


async def test_unix_sockets_are_plain_with_a_certificate_too(tmp_path: Path) -> None:
    server = GrpcServer()
    address = await server.start(f"unix:{tmp_path}/s.sock", tls("peer"))
    try:
        await server.set_serving(True)
        assert await status(address, tls("peer")) == await status(address) == SERVING
    finally:
        await server.stop(0)


class Silent(scheduler_pb2_grpc.SchedulerServiceServicer):
    """Only notes that it was asked."""

    asked = False

    async def Serve(self, *_: Any) -> None:  # type: ignore[override]
        self.asked = True

    async def Snapshot(self, *_: Any) -> scheduler_pb2.SnapshotResponse:
        self.asked = True
        return scheduler_pb2.SnapshotResponse()

    async def Drain(self, *_: Any) -> scheduler_pb2.DrainResponse:
        self.asked = True
        return scheduler_pb2.DrainResponse()


async def test_probes_see_the_health_and_nothing_else_without_a_certificate() -> None:
    server, silent = GrpcServer(), Silent()
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(silent, server.server)
    await server.start("127.0.0.1:0", tls("peer"))
    address = await server.start_health("127.0.0.1:0")
    try:
        await server.set_serving(False)
        assert await status(address) == NOT_SERVING
        assert await status(address, service=LIVE) == SERVING
        await server.set_serving(True)
        assert await status(address) == SERVING
        async with channel(address) as connection:
            stub = scheduler_pb2_grpc.SchedulerServiceStub(connection)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Snapshot(scheduler_pb2.SnapshotRequest(), timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert not silent.asked
    finally:
        await server.stop(0)


_COUNT_SWITCHES = """
import asyncio
from pathlib import Path
from fastserve.common.rpc import GrpcServer, channel
from grpc_health.v1 import health_pb2, health_pb2_grpc

def switches():
    threads = [task for task in Path("/proc/self/task").iterdir()
               if (task / "comm").read_text().startswith("event_engine")]
    return sum(int((task / "schedstat").read_text().split()[2]) for task in threads)

async def main():
    server = GrpcServer()
    async with channel(await server.start("127.0.0.1:0")) as connection:
        stub = health_pb2_grpc.HealthStub(connection)
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        before = switches()
        for _ in range(100):
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        print(switches() - before)
    await server.stop(0)

asyncio.run(main())
"""


def test_messages_do_not_pass_through_threads_of_an_event_engine() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_EXPERIMENTS"}
    done = subprocess.run(
        [sys.executable, "-c", _COUNT_SWITCHES],
        env=environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 50  # of 100 calls; with an event engine about ten for each
