"""One worker group: connect, describe, open the stream, carry plans down and reports up.

A broken stream is opened again for ever, with growing pauses. What the worker still holds is
learned from its inventory each time, so a link keeps no state across streams.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final, Protocol

import grpc
import structlog
from grpc import aio

from fastserve.common import rpc
from fastserve.common.tls import Tls
from fastserve.proto.v1 import worker_pb2, worker_pb2_grpc
from fastserve.scheduler.clock import Clock
from fastserve.scheduler.core import Inventory, Plan, ProtocolError, WorkerInfo
from fastserve.scheduler.metrics import Metrics
from fastserve.scheduler.store_errors import FencedError
from fastserve.scheduler.wire import StreamCodec, inventory_of, reset_plan, worker_info

log = structlog.get_logger(__name__)

_DESCRIBE_TIMEOUT_S: Final = 5.0
# KV copies under way end before the inventory is told.
_INVENTORY_TIMEOUT_S: Final = 30.0
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 2.0


class Director(Protocol):
    """What a link tells; the engine."""

    def codec(self) -> StreamCodec: ...

    def worker_up(self, link: WorkerLink, info: WorkerInfo, inventory: Inventory) -> None:
        """Raises `ProtocolError` if this worker cannot be used."""

    def worker_down(self, link: WorkerLink) -> None: ...

    def report(self, link: WorkerLink, wire: worker_pb2.IterationReport) -> None: ...


class WorkerLink:
    """The stream to the worker at `address`, and what the last report said."""

    def __init__(
        self,
        address: str,
        shard: str,
        epoch: int,
        director: Director,
        clock: Clock,
        metrics: Metrics,
        tls: Tls | None = None,
    ) -> None:
        self.address = address
        self.described: worker_pb2.DescribeResponse | None = None  # while connected
        self.free_device_blocks = 0
        self.free_host_blocks = 0
        self.iterations = 0
        self.iteration_s = 0.0
        self.sampled_tokens = 0
        self.processed_tokens = 0
        self.stream: StreamCodec | None = None
        self._shard = shard
        self._epoch = epoch
        self._director = director
        self._clock = clock
        self._metrics = metrics
        self._tls = tls
        self._outbox: asyncio.Queue[worker_pb2.RunRequest] = asyncio.Queue()
        self._in_flight: deque[tuple[int, float]] = deque()  # plan id, when it was sent

    @property
    def worker_id(self) -> str:
        return self.described.worker_id if self.described else ""

    def send(self, plan: Plan) -> None:
        """Put a plan on the way. The stream must be up."""
        assert self.stream is not None
        request = self.stream.encode(plan)
        self._in_flight.append((request.plan.plan_id, self._clock.now()))
        self._outbox.put_nowait(request)

    async def run(self) -> None:
        """Keep the stream open until cancelled.

        Raises `FencedError` when the worker already obeys a newer scheduler.
        """
        pause = _FIRST_PAUSE_S
        failing = False
        while True:
            try:
                async with rpc.channel(self.address, self._tls) as channel:
                    await self._converse(worker_pb2_grpc.WorkerServiceStub(channel))
            except aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                    raise FencedError(f"{self.address}: {error.details()}") from error
                reason = f"{error.code().name}: {error.details()}"
            except (ProtocolError, TimeoutError) as error:
                reason = str(error) or "no answer in time"
            if self.described is not None:
                failing = False
                pause = _FIRST_PAUSE_S
                self._forget()
            if not failing:
                log.warning("no stream to worker", address=self.address, reason=reason)
                failing = True
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_S)

    def _forget(self) -> None:
        self._director.worker_down(self)
        self.described = self.stream = None
        self._outbox = asyncio.Queue()
        self._in_flight.clear()

    async def _converse(self, stub: Any) -> None:
        described = await stub.Describe(worker_pb2.DescribeRequest(), timeout=_DESCRIBE_TIMEOUT_S)
        call = stub.Run()
        try:
            await call.write(reset_plan(self._shard, self._epoch))
            async with asyncio.timeout(_INVENTORY_TIMEOUT_S):
                report = await self._read(call, described.epoch)
                while not report.HasField("inventory"):
                    report = await self._read(call, described.epoch)
            self._open(described, report)
            sender = asyncio.ensure_future(self._send(call))
            try:
                while True:
                    report = await self._read(call, described.epoch)
                    self._note(report)
                    self._director.report(self, report)
            finally:
                sender.cancel()
        finally:
            call.cancel()

    def _open(
        self, described: worker_pb2.DescribeResponse, report: worker_pb2.IterationReport
    ) -> None:
        self.stream = self._director.codec()
        self._note(report)
        self.described = described
        try:
            self._director.worker_up(self, worker_info(described), inventory_of(report))
        except ProtocolError:
            self.described = self.stream = None
            raise
        log.info(
            "worker connected",
            address=self.address,
            worker=described.worker_id,
            model=described.model,
            device=described.device,
            device_blocks=described.device_blocks,
            jobs_held=len(report.inventory.job_ids),
        )

    async def _send(self, call: Any) -> None:
        """Write plans in order. A broken stream shows in the reader, too."""
        outbox = self._outbox
        while True:
            await call.write(await outbox.get())

    async def _read(self, call: Any, worker_epoch: int) -> worker_pb2.IterationReport:
        """The next report of this life of the worker."""
        while True:
            response = await call.read()
            if response is aio.EOF:
                # The status of the call says why; OK means that the worker is leaving.
                code = await call.code()
                if code is grpc.StatusCode.FAILED_PRECONDITION:
                    raise FencedError(f"{self.address}: {await call.details()}")
                raise ProtocolError(f"stream ended: {code.name} {await call.details()}".strip())
            report: worker_pb2.IterationReport = response.report
            if report.worker_epoch == worker_epoch:
                return report
            log.warning(
                "report of another life of the worker dropped",
                address=self.address,
                epoch=report.worker_epoch,
            )

    def _note(self, report: worker_pb2.IterationReport) -> None:
        self.free_device_blocks = report.free_device_blocks
        self.free_host_blocks = report.free_host_blocks
        if report.iteration:
            self.iterations += 1
            self.iteration_s = report.seconds
            self.sampled_tokens += len(report.sampled_tokens)
            self.processed_tokens += sum(report.row_new_tokens)
        now = self._clock.now()
        while self._in_flight and self._in_flight[0][0] <= report.plan_id:
            _, sent = self._in_flight.popleft()
            self._metrics.control_rtt.observe(max(0.0, now - sent - report.seconds))
