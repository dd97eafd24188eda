"""Scheduler and gateway processes, around workers that live in the test or are processes too."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from fastserve.common import rpc
from support.fake_worker import FakeWorker
from support.pod import Pod
from support.processes import Running, service
from support.valkey import Valkey

LEADER_TTL_S = 2.0  # the default


class SchedulerProcess:
    """One scheduler of a shard."""

    def __init__(self, shard: str, running: Running) -> None:
        self.shard = shard
        self.running = running
        self.address: str = running.info["address"]

    def kill(self) -> None:
        self.running.kill()

    def pause(self) -> None:
        self.running.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.running.process.send_signal(signal.SIGCONT)

    async def leads(self) -> bool:
        async with rpc.channel(self.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=1)
            except aio.AioRpcError:
                return False
            return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    async def leading(self, timeout: float = 30.0) -> float:
        """Wait until it leads; seconds it took."""
        started = time.monotonic()
        while not await self.leads():
            assert time.monotonic() - started < timeout, f"it does not lead:\n{self.log}"
            await asyncio.sleep(0.02)
        return time.monotonic() - started

    async def says(self, text: str, timeout: float = 30.0) -> None:
        """Wait until its log has `text`."""
        deadline = time.monotonic() + timeout
        while text not in self.log:
            assert time.monotonic() < deadline, f"no {text!r}:\n{self.log}"
            await asyncio.sleep(0.02)

    async def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples with these labels."""
        async with httpx.AsyncClient() as client:
            url = f"http://127.0.0.1:{self.running.info['metrics_port']}/metrics"
            text = (await client.get(url)).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    @property
    def log(self) -> str:
        return self.running.log.read_text()


@contextlib.contextmanager
def scheduler_process(
    folder: Path, valkey: Valkey, worker: FakeWorker | Pod, *flags: str, shard: str = "0"
) -> Iterator[SchedulerProcess]:
    """Ready means that Redis answered: it leads, or stands by."""
    with service(
        "fastserve.scheduler",
        folder,
        *("--listen", "127.0.0.1:0", "--redis-url", valkey.url, "--worker", worker.address),
        *("--shard", shard, "--leader-ttl", str(LEADER_TTL_S), *flags),
    ) as running:
        try:
            yield SchedulerProcess(shard, running)
        finally:
            running.process.send_signal(signal.SIGCONT)  # a paused one would not end


@contextlib.contextmanager
def gateway_process(
    folder: Path, model: Path, *schedulers: SchedulerProcess, flags: Sequence[str] = ()
) -> Iterator[tuple[str, Running]]:
    """Its URL and the process."""
    named = [f"--scheduler={one.shard}={one.address}" for one in schedulers]
    with service(
        "fastserve.gateway", folder, "--port", "0", "--model", str(model), *named, *flags
    ) as up:
        yield f"http://{up.info['address']}", up
