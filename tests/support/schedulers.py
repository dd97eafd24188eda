"""Scheduler services in the process of the test, on free ports."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastserve.common import rpc
from fastserve.proto.v1 import scheduler_pb2, scheduler_pb2_grpc
from fastserve.scheduler.service import Service
from fastserve.scheduler.settings import SchedulerSettings
from support.fake_worker import FakeWorker
from support.valkey import Valkey
from support.waiting import eventually


class RunningScheduler:
    """A service and the task it runs in."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._stop = asyncio.Event()
        self._task = asyncio.ensure_future(service.run(self._stop))

    @property
    def address(self) -> str:
        return self.service.address

    @property
    def leads(self) -> bool:
        return self.service.leader is not None

    def metric(self, name: str, **labels: str) -> float:
        return self.service.registry.get_sample_value(name, labels) or 0.0

    async def leading(self) -> None:
        """Wait until it leads. Shows why if it ended instead."""
        await eventually(lambda: self.leads or self._task.done(), "leadership")
        if self._task.done():
            await self._task

    async def ready(self, workers: int = 1) -> None:
        """Wait until it leads and so many workers are connected."""
        await self.leading()
        leader = self.service.leader
        assert leader is not None
        await eventually(
            lambda: len(leader.engine.links) >= workers or self._task.done(), "workers"
        )
        if self._task.done():
            await self._task

    async def stop(self) -> None:
        """As on SIGTERM."""
        self._stop.set()
        async with asyncio.timeout(30):
            await self._task

    async def kill(self) -> None:
        """Without a last write and without giving the lease up."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def snapshot(self) -> scheduler_pb2.SnapshotResponse:
        async with rpc.channel(self.address) as channel:
            stub: Any = scheduler_pb2_grpc.SchedulerServiceStub(channel)
            reply: scheduler_pb2.SnapshotResponse = await stub.Snapshot(
                scheduler_pb2.SnapshotRequest(include_jobs=True), timeout=10
            )
            return reply

    @property
    def ended(self) -> bool:
        return self._task.done()


async def start_scheduler(
    valkey: Valkey, *workers: FakeWorker | str, **settings: Any
) -> RunningScheduler:
    """Settings default to short times, so that tests wait little."""
    addresses = [worker if isinstance(worker, str) else worker.address for worker in workers]
    values: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "redis_url": valkey.url,
        "leader_ttl": 0.6,
        "redis_timeout": 2.0,
        "shutdown_timeout": 2.0,
        **settings,
    }
    service = Service(SchedulerSettings(workers=addresses, **values))
    await service.start()
    return RunningScheduler(service)


@contextlib.asynccontextmanager
async def running_scheduler(
    valkey: Valkey, *workers: FakeWorker | str, **settings: Any
) -> AsyncIterator[RunningScheduler]:
    """A leader with its workers connected."""
    scheduler = await start_scheduler(valkey, *workers, **settings)
    try:
        await scheduler.ready(len(workers))
        yield scheduler
    finally:
        if not scheduler.ended:
            await scheduler.stop()
