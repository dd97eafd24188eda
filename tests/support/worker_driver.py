"""A small scheduler: drives a real worker over its Run stream and keeps what it says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastserve.common.rpc import channel
from fastserve.proto.v1 import sampling_pb2, worker_pb2, worker_pb2_grpc
from support.waiting import eventually

OFFLOAD = worker_pb2.KV_OP_OFFLOAD
UPLOAD = worker_pb2.KV_OP_UPLOAD
DROP_DEVICE = worker_pb2.KV_OP_DROP_DEVICE
RELEASE = worker_pb2.KV_OP_RELEASE
COPY_OUT = worker_pb2.KV_OP_COPY_OUT
EXPORT = worker_pb2.KV_OP_EXPORT
OK = worker_pb2.KV_STATUS_OK
LOST = worker_pb2.KV_STATUS_LOST
NO_HOST_SPACE = worker_pb2.KV_STATUS_NO_HOST_SPACE
NOT_SENT = worker_pb2.KV_STATUS_NOT_SENT


class Done:
    """A KV operation that ended."""

    def __init__(self, report: worker_pb2.IterationReport, place: int) -> None:
        self.status = report.done_status[place]
        self.tokens = report.done_tokens[place]
        self.bytes = report.done_bytes[place]
        self.seconds = report.done_seconds[place]


class WorkerDriver:
    """One stream. Jobs are named by their ids; tokens, ends and operations are kept by the driver.

    `output` may be shared between drivers, as a token log is between two lives of a scheduler.
    """

    def __init__(
        self,
        call: Any,
        scheduler_epoch: int,
        output: dict[str, list[int]],
        shard: str,
    ) -> None:
        self._call = call
        self._epoch = scheduler_epoch
        self._shard = shard
        self._plan_id = 0
        self._lease = 0  # iterations that the last plan lets run
        self._op_id = 0
        self._handles: dict[str, int] = {}
        self._last_handle = 0
        self._jobs: dict[str, worker_pb2.Job] = {}
        self._reader: asyncio.Task[None] | None = None
        self.output = output
        self.finished: dict[str, sampling_pb2.FinishReason] = {}
        self.failed: dict[str, str] = {}
        self.done: dict[int, Done] = {}
        self.reports: list[worker_pb2.IterationReport] = []
        self.held: dict[str, tuple[int, int]] = {}
        self.place = worker_pb2.KvPlace()  # where it takes KV of others

    async def open(self) -> None:
        """Send the reset and take the inventory: job id -> (device tokens, host tokens).

        Raises `grpc.aio.AioRpcError` if the worker refuses the stream.
        """
        await self.send(reset=True, shard=self._shard)
        response = await asyncio.wait_for(self._call.read(), 20)
        assert response, "the worker ended the stream"
        first = response.report.inventory
        tokens = zip(first.device_tokens, first.host_tokens, strict=True)
        self.held = dict(zip(first.job_ids, tokens, strict=True))
        self.place = first.place
        self.reports.append(response.report)
        self._reader = asyncio.create_task(self._read())

    async def close(self) -> None:
        self._call.cancel()
        if self._reader is not None:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._reader

    # --- down --------------------------------------------------------------------------------

    def job(
        self,
        job_id: str,
        prompt: Sequence[int],
        *,
        salt: bytes = b"",
        imported: int = 0,
        **sampling: Any,
    ) -> str:
        """A job that goes out, whole, with the first plan that names it; returns its id.

        imported: tokens of it that another worker has sent. If it was named before, it goes out
        again."""
        self._handles.pop(job_id, None)
        params = sampling_pb2.SamplingParams(**{"max_tokens": 500, "ignore_eos": True, **sampling})
        self.output.setdefault(job_id, [])
        self._jobs[job_id] = worker_pb2.Job(
            job_id=job_id,
            token_ids=prompt,
            prompt_len=len(prompt),
            sampling=params,
            cache_salt=salt,
            imported_tokens=imported,
        )
        return job_id

    async def send(self, **fields: Any) -> None:
        """A plan as it is, with the next id."""
        self._plan_id += 1
        values = {"plan_id": self._plan_id, "scheduler_epoch": self._epoch, **fields}
        await self._call.write(worker_pb2.RunRequest(plan=worker_pb2.Plan(**values)))

    async def plan(
        self,
        rows: dict[str, int] | None = None,
        ops: Sequence[tuple[worker_pb2.KvOp, str]] = (),
        lease: int = 1,
        op_blocks: Sequence[int] = (),
        export_to: Sequence[worker_pb2.KvPlace] = (),
    ) -> list[int]:
        """rows: job id -> most tokens. Returns the ids of the operations."""
        rows = rows or {}
        self._lease = lease if rows else 0
        new = [self._meet(name) for name in [*rows, *(op[1] for op in ops)]]
        numbers = range(self._op_id + 1, self._op_id + 1 + len(ops))
        self._op_id += len(ops)
        await self.send(
            lease=lease,
            new_jobs=[job for job in new if job is not None],
            row_handles=[self._handles[name] for name in rows],
            row_tokens=rows.values(),
            op_ids=numbers,
            ops=[kind for kind, _ in ops],
            op_handles=[self._handles[name] for _, name in ops],
            op_blocks=op_blocks,
            export_to=export_to,
        )
        return list(numbers)

    async def export(
        self, job_id: str, to: worker_pb2.KvPlace, blocks: int = 1000, *, rows: int = 0
    ) -> Done:
        """Send its KV to another worker; meanwhile it gets a row for so many iterations."""
        (number,) = await self.plan(
            {job_id: 1} if rows else {},
            ops=[(EXPORT, job_id)],
            lease=max(rows, 1),
            op_blocks=[blocks],
            export_to=[to],
        )
        await self.until(lambda: number in self.done)
        return self.done[number]

    async def generate(self, job_id: str, count: int, chunk: int = 7) -> list[int]:
        """Run a job alone until it has `count` output tokens, and no further; all its tokens."""
        # The plan before may have a row for it too, and that goes on until the next one arrives.
        await self.until(lambda: self.at_rest)
        while (have := len(self.output[job_id])) < count:
            # A lease of what is missing cannot overshoot; chunks of a prefill use some of it up.
            await self.plan({job_id: chunk}, lease=count - have)
            await self.until(lambda: self.at_rest)
            assert job_id not in self.failed, self.failed
        return self.output[job_id]

    async def op(self, kind: worker_pb2.KvOp, job_id: str) -> Done:
        """One KV operation, and its end."""
        (number,) = await self.plan(ops=[(kind, job_id)])
        await self.until(lambda: number in self.done)
        return self.done[number]

    def _meet(self, job_id: str) -> worker_pb2.Job | None:
        if job_id in self._handles:
            return None
        self._last_handle += 1
        self._handles[job_id] = handle = self._last_handle
        job = worker_pb2.Job()
        job.CopyFrom(self._jobs[job_id])
        job.handle = handle
        job.token_ids.extend(self.output[job_id])
        return job

    # --- up ----------------------------------------------------------------------------------

    @property
    def iterations(self) -> int:
        """Iterations that ran on this stream."""
        return max(report.iteration for report in self.reports)

    @property
    def at_rest(self) -> bool:
        """Whether the last plan has no iterations left. Not before, if its rows all end early."""
        told = (report for report in self.reports if report.plan_id == self._plan_id)
        return sum(report.iteration > 0 for report in told) == self._lease

    @property
    def free_device_blocks(self) -> int:
        return self.reports[-1].free_device_blocks

    async def until(self, check: Callable[[], object], timeout: float = 20.0) -> None:
        """Wait for something in the reports; ends early, with an error, if the stream breaks."""

        def checked() -> object:
            if self._reader is not None and self._reader.done():
                self._reader.result()
                raise AssertionError("the worker ended the stream")
            return check()

        await eventually(checked, "a report of the worker", timeout)

    async def ended(self) -> None:
        """Wait until the stream ends; raises its error, if it has one."""
        assert self._reader is not None
        await asyncio.wait_for(asyncio.shield(self._reader), 20)

    async def _read(self) -> None:
        while response := await self._call.read():  # EOF is false
            self._take(response.report)

    def _take(self, report: worker_pb2.IterationReport) -> None:
        names = {handle: name for name, handle in self._handles.items()}
        sampled = zip(
            report.sampled_handles,
            report.sampled_indexes,
            report.sampled_tokens,
            report.finish_reasons,
            strict=True,
        )
        for handle, index, token, reason in sampled:
            assert index == len(self.output[names[handle]])
            self.output[names[handle]].append(token)
            if reason:
                self.finished[names[handle]] = reason
        for place, number in enumerate(report.done_op_ids):
            self.done[number] = Done(report, place)
        for handle, why in zip(report.failed_handles, report.failures, strict=True):
            self.failed[names.get(handle, str(handle))] = why
        if report.HasField("place"):
            self.place = report.place
        self.reports.append(report)


@contextlib.asynccontextmanager
async def worker_driver(
    address: str, epoch: int = 1, output: dict[str, list[int]] | None = None, shard: str = "0"
) -> AsyncIterator[WorkerDriver]:
    """A stream that is open and has its inventory."""
    async with channel(address) as connection:
        stub = worker_pb2_grpc.WorkerServiceStub(connection)
        driver = WorkerDriver(stub.Run(), epoch, output if output is not None else {}, shard)
        try:
            await driver.open()
            yield driver
        finally:
            await driver.close()
