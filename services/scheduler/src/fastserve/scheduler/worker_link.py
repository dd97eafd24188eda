"""One worker group: connect, describe, open the stream, carry plans down and reports up.

A broken stream is opened again until nobody knows the address any more, with growing pauses. What
the worker still holds is learned from its inventory each time, so a link keeps no state across
streams, but for how often the worker broke the protocol: one that does so again and again gets
longer and longer pauses, or it would take jobs each time and lose them again.
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
from fastserve.scheduler.discovery import Endpoint
from fastserve.scheduler.metrics import Metrics
from fastserve.scheduler.store_errors import FencedError
from fastserve.scheduler.wire import StreamCodec, inventory_of, reset_plan, worker_info

log = structlog.get_logger(__name__)

_DESCRIBE_TIMEOUT_S: Final = 5.0
# KV copies under way end before the inventory is told.
_INVENTORY_TIMEOUT_S: Final = 30.0
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 0.5
_LONGEST_BAN_S: Final = 60.0  # of a worker that breaks the protocol; also how long that is held
#                               against it
_KINDS: Final = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: "message_too_large",
    grpc.StatusCode.PERMISSION_DENIED: "refused",
    grpc.StatusCode.INVALID_ARGUMENT: "refused",
}


class WorkerFault(Exception):
    """Why a stream ended. kind: for the metric."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Director(Protocol):
    """What a link tells; the engine."""

    def codec(self) -> StreamCodec: ...

    def worker_up(self, link: WorkerLink, info: WorkerInfo, inventory: Inventory) -> None:
        """Raises `ProtocolError` if this worker cannot be used."""

    def worker_down(self, link: WorkerLink) -> None: ...

    def report(self, link: WorkerLink, wire: worker_pb2.IterationReport) -> None: ...


class WorkerLink:
    """The stream to a worker, and what the last report said."""

    def __init__(
        self,
        endpoint: Endpoint,
        shard: str,
        epoch: int,
        director: Director,
        clock: Clock,
        metrics: Metrics,
        tls: Tls | None = None,
    ) -> None:
        self.address, self.pod = endpoint.address, endpoint.pod
        self.described: worker_pb2.DescribeResponse | None = None  # while connected
        self.free_device_blocks = 0
        self.free_host_blocks = 0
        self.iterations = 0
        self.iteration_s = 0.0
        self.sampled_tokens = 0
        self.processed_tokens = 0
        self.last_heard = 0.0  # when the last report came
        self.wanted = True  # the address is still known; else the link ends with its stream
        self.drain_order: bool | None = None  # on its way to the worker
        self.stream: StreamCodec | None = None
        self._shard = shard
        self._epoch = epoch
        self._director = director
        self._clock = clock
        self._metrics = metrics
        self._tls = tls
        self._outbox: asyncio.Queue[worker_pb2.RunRequest] = asyncio.Queue()
        self._in_flight: deque[tuple[int, float]] = deque()  # plan id, when it was sent
        self._cut: asyncio.Future[None] | None = (
            None  # resolved with the fault that ends the stream
        )
        self._strikes = 0
        self._opened = 0.0  # when the last stream was

    @property
    def worker_id(self) -> str:
        return self.described.worker_id if self.described else ""

    def send(self, plan: Plan) -> None:
        """Put a plan on the way. The stream must be up."""
        assert self.stream is not None
        request = self.stream.encode(plan)
        if self.drain_order is not None:
            request.plan.drain = self.drain_order
        self._in_flight.append((request.plan.plan_id, self._clock.now()))
        self._outbox.put_nowait(request)

    async def run(self) -> None:
        """Keep the stream open until cancelled, or until it has ended and is not `wanted`.

        Raises `FencedError` when the worker already obeys a newer scheduler.
        """
        pause = _FIRST_PAUSE_S
        failing = False
        while True:
            fault = await self._try()
            connected = self.described is not None
            if connected:
                failing = False
                pause = _FIRST_PAUSE_S
                self._forget()
            if not failing:
                log.warning(
                    "no stream to worker",
                    address=self.address,
                    fault=fault.kind,
                    reason=str(fault),
                )
                self._metrics.worker_faults.labels(fault.kind).inc()
                failing = True
            if not self.wanted:
                return
            if fault.kind == "protocol":
                lasted = self._clock.now() - self._opened
                self._strikes = 1 if connected and lasted > _LONGEST_BAN_S else self._strikes + 1
                pause = min(2.0 ** min(self._strikes, 10) / 2, _LONGEST_BAN_S)
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_S)

    async def _try(self) -> WorkerFault:
        """One stream, from its opening to the fault that ended it. Raises `FencedError`."""
        try:
            async with rpc.channel(self.address, self._tls) as channel:
                await self._converse(worker_pb2_grpc.WorkerServiceStub(channel))
        except aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise FencedError(f"{self.address}: {error.details()}") from error
            otherwise = "unreachable" if self.described is None else "stream_lost"
            kind = _KINDS.get(error.code(), otherwise)
            return WorkerFault(kind, f"{error.code().name}: {error.details()}")
        except ProtocolError as error:
            return WorkerFault("protocol", str(error))
        except TimeoutError:
            return WorkerFault("silent", "no inventory in time")
        except WorkerFault as fault:
            return fault
        raise AssertionError("a stream never ends without a reason")

    def cut(self, kind: str, reason: str) -> None:
        """End the stream from here."""
        if self._cut is not None and not self._cut.done():
            self._cut.set_exception(WorkerFault(kind, reason))

    def _forget(self) -> None:
        self._director.worker_down(self)
        self.described = self.stream = self.drain_order = None
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
            self._cut = asyncio.get_running_loop().create_future()
            sender = asyncio.ensure_future(self._send(call))
            listener = asyncio.ensure_future(self._listen(call, described.epoch))
            try:
                await asyncio.wait({listener, self._cut}, return_when=asyncio.FIRST_COMPLETED)
                if self._cut.done():
                    self._cut.result()
                listener.result()
            finally:
                sender.cancel()
                listener.cancel()
                self._cut.cancel()
        finally:
            call.cancel()

    def _open(
        self, described: worker_pb2.DescribeResponse, report: worker_pb2.IterationReport
    ) -> None:
        self.stream = self._director.codec()
        self._note(report)
        self._opened = self.last_heard
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

    async def _listen(self, call: Any, worker_epoch: int) -> None:
        while True:
            report = await self._read(call, worker_epoch)
            self._note(report)
            self._director.report(self, report)

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
                kind = "left" if code is grpc.StatusCode.OK else _KINDS.get(code, "stream_lost")
                raise WorkerFault(kind, f"{code.name} {await call.details()}".strip())
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
        self.last_heard = now = self._clock.now()
        while self._in_flight and self._in_flight[0][0] <= report.plan_id:
            _, sent = self._in_flight.popleft()
            self._metrics.control_rtt.observe(max(0.0, now - sent - report.seconds))
