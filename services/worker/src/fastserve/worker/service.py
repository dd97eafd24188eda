"""The gRPC service of a worker: Describe, and one Run stream at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, TypeAlias

import grpc
import structlog

from fastserve.proto.v1 import worker_pb2 as pb
from fastserve.proto.v1 import worker_pb2_grpc as pb_grpc
from fastserve.worker.engine import Engine, Iteration, Plan
from fastserve.worker.engine_thread import EngineThread
from fastserve.worker.metrics import Metrics
from fastserve.worker.mover import StagingMover
from fastserve.worker.staging import SidecarLost
from fastserve.worker.tracing import IterationTracer
from fastserve.worker.wire import BadPlan, plan_from, report_from

log = structlog.get_logger(__name__)
_POLL_S = 0.05
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Worker(pb_grpc.WorkerServiceServicer):
    """Serves one scheduler at a time; the state of jobs outlives its stream."""

    def __init__(
        self,
        description: pb.DescribeResponse,
        engine: Engine,
        thread: EngineThread,
        mover: StagingMover,
        metrics: Metrics,
    ) -> None:
        self._description = description
        self._engine = engine  # touched by way of the thread only, but for `pool.free`
        self._thread, self._mover = thread, mover
        self._waiting: deque[Plan] = deque()  # that take effect with the next iteration
        self._metrics = metrics
        self._tracer = IterationTracer()
        self._outgoing: asyncio.Queue[pb.IterationReport | None] | None = None
        self._scheduler_epoch = 0
        self._shard: str | None = None  # of the first scheduler; epochs of others mean nothing
        self._newest: object = None  # the stream that opened last
        self._turn = asyncio.Lock()
        self._plan_id = 0  # of the last report
        self._told: list[str] = []  # where we take KV of other groups, as the scheduler knows it
        self._may_leave = asyncio.Event()  # all our jobs have been taken away
        if mover.staging is not None:
            mover.staging.attached = self._moved

    def drain(self, draining: bool) -> None:
        """Ask the scheduler to take our jobs away and to send no new ones, or end that."""
        if draining is self._description.draining:
            return
        self._description.draining = draining
        self._may_leave.clear()
        log.info("draining" if draining else "taking jobs again")
        self.report(Iteration(self._plan_id))

    async def leave(self, timeout: float) -> bool:
        """Drain, and wait until we are not needed any more; False if that took too long.

        Without a scheduler whoever is next may still want what is on the device.
        """
        self.drain(True)
        try:
            async with asyncio.timeout(timeout):
                while self._outgoing is None and not self._idle:  # noqa: ASYNC110  # a few times
                    await asyncio.sleep(_POLL_S)
                if self._outgoing is not None:
                    await self._may_leave.wait()
        except TimeoutError:
            return False
        return True

    @property
    def _idle(self) -> bool:
        return self._engine.pool.free == self._description.device_blocks

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:
        return self._description

    async def Run(
        self, request_iterator: AsyncIterator[pb.RunRequest], context: Context
    ) -> AsyncIterator[pb.RunResponse]:
        first = await anext(aiter(request_iterator), None)
        if first is None:
            return
        plan = first.plan
        if not plan.reset or plan.row_handles or plan.ops:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "the first plan must be a reset and nothing else"
            )
        if self._shard not in (None, plan.shard):
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED,
                f"this worker belongs to shard {self._shard!r}, not {plan.shard!r}",
            )
        if plan.scheduler_epoch < self._scheduler_epoch:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"a scheduler with epoch {self._scheduler_epoch} is served already",
            )
        self._shard, self._scheduler_epoch = plan.shard, plan.scheduler_epoch
        this = self._newest = object()
        if self._outgoing is not None:
            self._outgoing.put_nowait(None)  # ends the stream before this one
        async with self._turn:
            outgoing: asyncio.Queue[pb.IterationReport | None] = asyncio.Queue()
            if self._newest is this:
                inventory = await self._take_stock(plan.plan_id)
            # A newer one may have come at any time until here, and nothing else ends this stream.
            if self._newest is not this:
                await context.abort(
                    grpc.StatusCode.FAILED_PRECONDITION, "a newer stream was opened"
                )
            self._outgoing, self._plan_id = outgoing, plan.plan_id
            self._mover.allow_exports(True)
            outgoing.put_nowait(inventory)
            reader = asyncio.create_task(self._read(request_iterator, outgoing, plan))
            try:
                while (report := await outgoing.get()) is not None:
                    yield pb.RunResponse(report=report)
                if reader.done() and (error := reader.exception()) is not None:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            finally:
                self._outgoing = None
                self._thread.post(Engine.detach)
                self._mover.allow_exports(False)
                reader.cancel()
                with contextlib.suppress(asyncio.CancelledError, BadPlan, grpc.RpcError):
                    await reader

    async def _read(
        self,
        requests: AsyncIterator[pb.RunRequest],
        outgoing: asyncio.Queue[pb.IterationReport | None],
        reset: pb.Plan,
    ) -> None:
        """Hand plans to the engine thread until the scheduler ends its side."""
        last = reset.plan_id
        try:
            async for request in requests:
                if request.plan.plan_id <= last:
                    raise BadPlan(f"plan {request.plan.plan_id} after plan {last}")
                if request.plan.scheduler_epoch != reset.scheduler_epoch:
                    raise BadPlan(
                        f"epoch {request.plan.scheduler_epoch} on a stream of "
                        f"epoch {reset.scheduler_epoch}"
                    )
                last = request.plan.plan_id
                if request.plan.HasField("drain"):
                    self.drain(request.plan.drain)
                if request.plan.may_leave:
                    self._may_leave.set()
                self._hand_over(plan_from(request.plan))
        finally:
            outgoing.put_nowait(None)

    def _hand_over(self, plan: Plan) -> None:
        """To the engine: it takes effect at the next boundary, but copies for jobs that have no row
        begin now."""
        waiting = self._waiting
        if plan.ops:
            begun = self._thread.at_once(lambda engine: engine.begin_ops(plan, waiting))
            if begun:
                plan = replace(plan, ops=plan.ops[begun:])
        waiting.append(plan)
        self._thread.post(lambda engine: engine.apply(waiting.popleft()))

    async def _take_stock(self, plan_id: int) -> pb.IterationReport:
        """Wait for copies under way, then put the engine at the start of a new stream."""
        while await self._thread.ask(lambda engine: engine.kv_ops.copies):
            await self._mover.settle()
        host: dict[str, int] = {}
        if self._mover.staging is not None:
            try:
                host = await self._mover.staging.inventory()
            except SidecarLost as error:
                log.warning("no inventory from kv-offload", reason=str(error))
        held = await self._thread.ask(lambda engine: engine.reset(plan_id, host))
        report = report_from(
            Iteration(plan_id), self._description.epoch, self._engine.pool.free, self._free_host
        )
        report.inventory.job_ids.extend(held)
        report.inventory.device_tokens.extend(device for device, _ in held.values())
        report.inventory.host_tokens.extend(tokens for _, tokens in held.values())
        report.inventory.place.CopyFrom(self._place())
        log.info("serving a scheduler", epoch=self._scheduler_epoch, jobs_held=len(held))
        return report

    def _moved(self) -> None:
        """The sidecar may have come back under another address."""
        if self._peers != self._told:
            self.report(Iteration(self._plan_id))

    @property
    def _peers(self) -> list[str]:
        staging = self._mover.staging
        return staging.peers if staging is not None else []

    def _place(self) -> pb.KvPlace:
        """To be told: where other groups can send KV to."""
        self._told = self._peers
        staging = self._mover.staging
        layout = staging.layout if staging is not None else ""
        return pb.KvPlace(worker_id=self._description.worker_id, layout=layout, peers=self._told)

    @property
    def _free_host(self) -> int:
        staging = self._mover.staging
        return staging.free_host_blocks if staging is not None else 0

    def report(self, iteration: Iteration) -> None:
        """Called on the event loop for everything the engine has to say."""
        free = self._engine.pool.free
        self._plan_id = iteration.plan_id
        if self._outgoing is not None:
            report = report_from(iteration, self._description.epoch, free, self._free_host)
            report.draining = self._description.draining
            if self._peers != self._told:
                report.place.CopyFrom(self._place())
            self._outgoing.put_nowait(report)
        # Once it has left: somebody may wait for its tokens.
        asyncio.get_running_loop().call_soon(self._observe, iteration, free)

    def _observe(self, iteration: Iteration, free: int) -> None:
        self._metrics.observe(iteration, free)
        self._tracer.observe(iteration)
