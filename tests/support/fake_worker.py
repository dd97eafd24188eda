"""A worker group without a model: the real gRPC contract, tokens from a hash.

It keeps plans, leases, handles, KV operations, block counts and inventories as the proto says, and
notes in `violations` whatever a scheduler does against it. `gate` decides when iterations run.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc import aio

from fastserve.common.rpc import GrpcServer
from fastserve.proto.v1 import sampling_pb2, worker_pb2, worker_pb2_grpc

VOCAB = 1000


def token_at(seed: int, position: int) -> int:
    """The token that a job with this seed has at this output position."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) % VOCAB


def expected_tokens(seed: int, count: int) -> list[int]:
    return [token_at(seed, position) for position in range(count)]


class Gate:
    """Lets iterations pass: closed, one by one, or freely."""

    def __init__(self) -> None:
        self._free = asyncio.Event()
        self._permits = 0
        self._changed = asyncio.Condition()
        self._free.set()

    def open(self) -> None:
        self._free.set()

    def close(self) -> None:
        self._free.clear()

    async def step(self, iterations: int = 1) -> None:
        """Let so many more iterations pass while closed."""
        async with self._changed:
            self._permits += iterations
            self._changed.notify_all()

    async def enter(self) -> None:
        """Called by the worker before an iteration."""
        free = asyncio.ensure_future(self._free.wait())
        permit = asyncio.ensure_future(self._permit())
        try:
            await asyncio.wait({free, permit}, return_when=asyncio.FIRST_COMPLETED)
            if permit.done() and not free.done():
                self._permits -= 1
        finally:
            free.cancel()
            permit.cancel()

    async def _permit(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._permits > 0)


@dataclass
class _Job:
    job_id: str
    tokens: list[int]
    prompt_len: int
    sampling: sampling_pb2.SamplingParams
    computed: int = 0  # tokens in device KV
    host: int = 0  # committed tokens on the host
    blocks: int = 0  # on the device
    finished: bool = False
    moving: bool = False


@dataclass
class _Stream:
    """What lives as long as one Run call."""

    epoch: int
    plans: asyncio.Queue[worker_pb2.Plan] = field(default_factory=asyncio.Queue)
    handles: dict[int, str] = field(default_factory=dict)
    rows: list[tuple[int, int]] = field(default_factory=list)
    lease: int = 0
    plan_id: int = 0
    last_op: int = 0
    iteration: int = 0
    # Operation id, kind, handle, blocks.
    pending: list[tuple[int, int, int, int]] = field(default_factory=list)
    restate: asyncio.Event = field(default_factory=asyncio.Event)  # a report is due
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    refusal: tuple[grpc.StatusCode, str] = (grpc.StatusCode.UNAVAILABLE, "stream broken")


class FakeWorker(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(
        self,
        *,
        worker_id: str = "w0",
        model: str = "fake",
        block_size: int = 4,
        device_blocks: int = 64,
        host_blocks: int = 256,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_model_len: int = 2048,
        iteration_s: float = 0.001,
        prefill_s: float | None = None,
    ) -> None:
        """prefill_s: that it claims for 64 tokens (default: four iterations; the truth is one)."""
        self.described = worker_pb2.DescribeResponse(
            worker_id=worker_id,
            epoch=1,
            model=model,
            dtype="float32",
            device="none",
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            block_bytes=block_size * 100,
            device_blocks=device_blocks,
            host_blocks=host_blocks,
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            vocab_size=VOCAB,
            prefill_cost=worker_pb2.CostSample(
                rows=1, new_tokens=64, context_tokens=64, seconds=prefill_s or iteration_s * 4
            ),
            decode_cost=worker_pb2.CostSample(
                rows=1, new_tokens=1, context_tokens=64, seconds=iteration_s
            ),
        )
        self.gate = Gate()
        self.address = ""
        self.violations: list[str] = []
        self.plans: list[worker_pb2.Plan] = []
        self.iterations = 0
        self.streams = 0
        self.shard: str | None = None  # of the first scheduler
        self.prefilled: dict[str, int] = {}  # prompt and recomputed tokens processed, by job
        self.fail_next: dict[str, str] = {}  # job id -> how it fails in the next iteration
        self.mangle: Callable[[worker_pb2.IterationReport], None] = lambda _: None
        #   what a broken worker does to its reports
        self.may_leave = asyncio.Event()  # a plan said so
        self.iteration_s = iteration_s
        self._jobs: dict[str, _Job] = {}
        self._stream: _Stream | None = None
        self._seen_epoch = 0
        self._server: GrpcServer | None = None

    # For tests

    @contextlib.asynccontextmanager
    async def serving(self, address: str = "127.0.0.1:0") -> AsyncIterator[FakeWorker]:
        await self.start(address)
        try:
            yield self
        finally:
            await self.stop()

    async def start(self, address: str = "127.0.0.1:0") -> None:
        self._server = GrpcServer()
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, self._server.server)
        self.address = await self._server.start(address)

    async def stop(self) -> None:
        if self._server is not None:
            self.break_stream()
            await self._server.stop(0)
            self._server = None

    def break_stream(self) -> None:
        """As if the connection broke: what the worker holds stays."""
        if self._stream is not None:
            self._stream.ended.set()

    def drain(self, draining: bool = True) -> None:
        """As on SIGTERM: it asks for its jobs to be taken away."""
        self.described.draining = draining
        self.may_leave.clear()
        if self._stream is not None:
            self._stream.restate.set()

    def lose_kv(self, *, host: bool) -> None:
        """As if the process had died and come back: device KV is gone, host KV if `host`."""
        self.break_stream()
        self.described.epoch += 1
        self._jobs = {
            job_id: _Job(job_id, job.tokens, job.prompt_len, job.sampling, host=job.host)
            for job_id, job in self._jobs.items()
            if job.host and not host
        }

    @property
    def held(self) -> dict[str, tuple[int, int]]:
        """Device and host tokens by job."""
        return {job.job_id: (job.computed, job.host) for job in self._jobs.values()}

    # The contract

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: aio.ServicerContext[Any, Any]
    ) -> worker_pb2.DescribeResponse:
        return self.described

    async def Run(  # type: ignore[override]  # the stubs do not know writing to the context
        self, request_iterator: Any, context: aio.ServicerContext[Any, Any]
    ) -> None:
        first = await context.read()
        if first is aio.EOF:
            return
        if not first.plan.reset or first.plan.row_handles or not first.plan.plan_id:
            self.violations.append("a stream must open with a reset plan without rows")
        if self.shard not in (None, first.plan.shard):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"belongs to {self.shard}")
        self.shard = first.plan.shard
        if first.plan.scheduler_epoch < self._seen_epoch:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "a newer scheduler is here")
        if self._stream is not None:
            self.break_stream()
        self._seen_epoch = first.plan.scheduler_epoch
        self.streams += 1
        stream = self._stream = _Stream(self._seen_epoch, plan_id=first.plan.plan_id)
        for job in self._jobs.values():
            job.moving = False
        tasks = [
            asyncio.ensure_future(self._read(stream, context)),
            asyncio.ensure_future(self._work(stream, context)),
            asyncio.ensure_future(stream.ended.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            if self._stream is stream:
                self._stream = None
        if not stream.ended.is_set():  # else jobs may have been taken away under it
            self.violations += [repr(error) for error in results if isinstance(error, KeyError)]
        if stream.ended.is_set():
            await context.abort(*stream.refusal)

    async def _read(self, stream: _Stream, context: aio.ServicerContext[Any, Any]) -> None:
        while (request := await context.read()) is not aio.EOF:
            self.plans.append(request.plan)
            stream.plans.put_nowait(request.plan)

    async def _work(self, stream: _Stream, context: aio.ServicerContext[Any, Any]) -> None:
        report = self._report(stream)
        held = [job for job in self._jobs.values() if job.computed or job.host]
        report.inventory.SetInParent()
        report.inventory.job_ids.extend(job.job_id for job in held)
        report.inventory.device_tokens.extend(job.computed for job in held)
        report.inventory.host_tokens.extend(job.host for job in held)
        await context.write(worker_pb2.RunResponse(report=report))
        while True:
            idle = not self._runnable(stream) and not stream.pending and stream.plans.empty()
            if idle and not await self._next_plan(stream):
                await context.write(worker_pb2.RunResponse(report=self._report(stream)))
                continue
            while not stream.plans.empty():
                self._apply(stream, stream.plans.get_nowait())
            if self._runnable(stream):
                await self.gate.enter()
                await asyncio.sleep(self.iteration_s)
                if stream.ended.is_set():
                    return
                while not stream.plans.empty():  # the boundary is now
                    self._apply(stream, stream.plans.get_nowait())
            report = self._report(stream)
            if self._runnable(stream):
                self._iterate(stream, report)
            self._complete(stream, report)
            if report.iteration or report.done_op_ids:
                report.free_device_blocks = self._free_device()
                report.free_host_blocks = self._free_host()
                if report.iteration:
                    self.mangle(report)
                await context.write(worker_pb2.RunResponse(report=report))

    def _report(self, stream: _Stream) -> worker_pb2.IterationReport:
        return worker_pb2.IterationReport(
            worker_epoch=self.described.epoch,
            plan_id=stream.plan_id,
            free_device_blocks=self._free_device(),
            free_host_blocks=self._free_host(),
            started_unix_s=time.time(),
            seconds=self.iteration_s,
            draining=self.described.draining,
        )

    async def _next_plan(self, stream: _Stream) -> bool:
        """Wait for one; False if there is something to report first."""
        plan = asyncio.ensure_future(stream.plans.get())
        restate = asyncio.ensure_future(stream.restate.wait())
        try:
            await asyncio.wait({plan, restate}, return_when=asyncio.FIRST_COMPLETED)
            if plan.done():
                self._apply(stream, plan.result())
                return True
            stream.restate.clear()
            return False
        finally:
            plan.cancel()
            restate.cancel()

    def _runnable(self, stream: _Stream) -> bool:
        return stream.lease > 0 and any(
            not self._jobs[stream.handles[handle]].finished
            for handle, _ in stream.rows
            if handle in stream.handles
        )

    def _apply(self, stream: _Stream, plan: worker_pb2.Plan) -> None:
        if plan.plan_id <= stream.plan_id:
            self.violations.append(f"plan {plan.plan_id} after {stream.plan_id}")
        if plan.scheduler_epoch != stream.epoch or plan.reset:
            self.violations.append("plan of another epoch, or a second reset")
        stream.plan_id, stream.lease = plan.plan_id, plan.lease
        if plan.HasField("drain"):
            self.drain(plan.drain)
        if plan.may_leave:
            self.may_leave.set()
        if self.described.draining and plan.new_jobs and self.may_leave.is_set():
            self.violations.append("new jobs for a worker that may leave")
        for new in plan.new_jobs:
            self._admit(stream, new)
        ops = zip(plan.op_ids, plan.ops, plan.op_handles, plan.op_blocks, strict=True)
        for op_id, kind, handle, blocks in ops:
            if op_id <= stream.last_op:
                self.violations.append(f"operation {op_id} after {stream.last_op}")
            stream.last_op = op_id
            stream.pending.append((op_id, kind, handle, blocks))
            self._jobs[stream.handles[handle]].moving = kind in (
                worker_pb2.KV_OP_OFFLOAD,
                worker_pb2.KV_OP_UPLOAD,
            )
        stream.rows = list(zip(plan.row_handles, plan.row_tokens, strict=True))
        if len(stream.rows) > self.described.max_num_seqs:
            self.violations.append(f"{len(stream.rows)} rows")
        for handle, _ in stream.rows:
            job = self._jobs[stream.handles[handle]]
            if job.moving or (not job.computed and job.host and job.blocks == 0):
                self.violations.append(f"row for {job.job_id}, whose KV is not on the device")

    def _admit(self, stream: _Stream, new: worker_pb2.Job) -> None:
        if new.handle in stream.handles:
            self.violations.append(f"handle {new.handle} twice")
        stream.handles[new.handle] = new.job_id
        known = self._jobs.get(new.job_id)
        tokens = list(new.token_ids)
        job = _Job(new.job_id, tokens, new.prompt_len, new.sampling)
        if known is not None:
            pairs = enumerate(zip(known.tokens, tokens, strict=False))
            shorter = min(len(known.tokens), len(tokens))
            common = next((at for at, (mine, theirs) in pairs if mine != theirs), shorter)
            job.computed = min(known.computed, common)
            job.host = min(known.host, common)
            job.blocks = known.blocks
        self._jobs[new.job_id] = job

    def _iterate(self, stream: _Stream, report: worker_pb2.IterationReport) -> None:
        stream.iteration += 1
        stream.lease -= 1
        self.iterations += 1
        report.iteration = stream.iteration
        for handle, limit in stream.rows:
            job = self._jobs[stream.handles[handle]]
            if job.finished:
                continue
            if job.job_id in self.fail_next:
                report.failed_handles.append(handle)
                report.failures.append(self.fail_next.pop(job.job_id))
                job.finished = True
                continue
            new = min(limit, len(job.tokens) - job.computed)
            blocks = -(-(job.computed + new) // self.described.block_size)
            if blocks - job.blocks > self._free_device():
                self.violations.append(f"no device block for {job.job_id}")
                report.stalled_handles.append(handle)
                continue
            job.blocks = max(job.blocks, blocks)
            job.computed += new
            if new > 1:
                self.prefilled[job.job_id] = self.prefilled.get(job.job_id, 0) + new
            report.row_handles.append(handle)
            report.row_new_tokens.append(new)
            report.row_computed.append(job.computed)
            report.context_tokens += job.computed
            if job.computed == len(job.tokens):
                self._sample(handle, job, report)
        if sum(report.row_new_tokens) > self.described.max_num_batched_tokens:
            self.violations.append(f"{sum(report.row_new_tokens)} tokens in an iteration")

    def _sample(self, handle: int, job: _Job, report: worker_pb2.IterationReport) -> None:
        position = len(job.tokens) - job.prompt_len
        token = token_at(job.sampling.seed, position)
        job.tokens.append(token)
        reason = sampling_pb2.FINISH_REASON_UNSPECIFIED
        if token in job.sampling.stop_token_ids and position + 1 >= job.sampling.min_tokens:
            reason = sampling_pb2.FINISH_REASON_STOP
        elif position + 1 >= job.sampling.max_tokens:
            reason = sampling_pb2.FINISH_REASON_LENGTH
        job.finished = reason != sampling_pb2.FINISH_REASON_UNSPECIFIED
        report.sampled_handles.append(handle)
        report.sampled_indexes.append(position)
        report.sampled_tokens.append(token)
        report.finish_reasons.append(reason)
        report.has_logprobs.append(int(job.sampling.HasField("logprobs")))
        if job.sampling.HasField("logprobs"):
            count = job.sampling.logprobs
            report.logprobs.append(-position)
            report.top_counts.append(count)
            report.top_ids.extend((token + rank) % VOCAB for rank in range(count))
            report.top_logprobs.extend(-position - rank for rank in range(count))

    def _complete(self, stream: _Stream, report: worker_pb2.IterationReport) -> None:
        """Operations started before this iteration end with it."""
        pending, stream.pending = stream.pending, []
        for op_id, kind, handle, blocks in pending:
            job = self._jobs[stream.handles[handle]]
            status, tokens, copied = self._operate(kind, job, blocks)
            job.moving = False
            if kind == worker_pb2.KV_OP_RELEASE:
                del self._jobs[stream.handles.pop(handle)]
                stream.rows = [row for row in stream.rows if row[0] != handle]
            report.done_op_ids.append(op_id)
            report.done_status.append(status)
            report.done_tokens.append(tokens)
            report.done_bytes.append(copied * 100)
            report.done_seconds.append(0.0001)

    def _operate(self, kind: int, job: _Job, blocks: int) -> tuple[worker_pb2.KvStatus, int, int]:
        """Status, tokens to report, tokens copied."""
        if kind == worker_pb2.KV_OP_OFFLOAD:
            more = self._blocks(job.computed) - self._blocks(job.host)
            if more > self._free_host():
                return worker_pb2.KV_STATUS_NO_HOST_SPACE, 0, 0
            copied = job.computed - job.host
            job.host, job.computed, job.blocks = job.computed, 0, 0
            return worker_pb2.KV_STATUS_OK, job.host, copied
        if kind == worker_pb2.KV_OP_COPY_OUT:
            size = self.described.block_size
            host = max(job.host, min(job.computed // size, job.host // size + blocks) * size)
            if self._blocks(host) - self._blocks(job.host) > self._free_host():
                return worker_pb2.KV_STATUS_NO_HOST_SPACE, 0, 0
            copied, job.host = host - job.host, host
            return worker_pb2.KV_STATUS_OK, host, copied
        if kind == worker_pb2.KV_OP_UPLOAD:
            if not job.host:
                return worker_pb2.KV_STATUS_LOST, 0, 0
            if self._blocks(job.host) > self._free_device():
                return worker_pb2.KV_STATUS_NO_DEVICE_SPACE, 0, 0
            job.computed, job.blocks = job.host, self._blocks(job.host)
            return worker_pb2.KV_STATUS_OK, job.computed, job.computed
        if kind in (worker_pb2.KV_OP_DROP_DEVICE, worker_pb2.KV_OP_RELEASE):
            job.computed = job.blocks = 0
        elif kind == worker_pb2.KV_OP_DROP_HOST:
            job.host = 0
        return worker_pb2.KV_STATUS_OK, 0, 0

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.described.block_size)

    def _free_device(self) -> int:
        return self.described.device_blocks - sum(job.blocks for job in self._jobs.values())

    def _free_host(self) -> int:
        used = sum(self._blocks(job.host) for job in self._jobs.values())
        return self.described.host_blocks - used
