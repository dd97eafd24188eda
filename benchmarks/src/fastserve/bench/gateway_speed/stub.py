"""A scheduler without scheduling: every job gets one token per iteration, on schedule.

    python -m fastserve.bench.gateway_speed.stub --listen unix:/path --iteration 0.0128

Takes every job, and ends it at its max_tokens. Tokens travel as the real scheduler sends them: one
packed message per iteration. An iteration that is late is sent at once, and none is made up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from grpc import aio

from fastserve.common.rpc import GrpcServer
from fastserve.proto.v1 import sampling_pb2, scheduler_pb2, scheduler_pb2_grpc

_LONGEST = 8192  # tokens of a job
_FIRST_TOKEN, _TOKENS = 1000, 20_000  # ordinary words in the vocabulary of any model


@dataclass(slots=True)
class _Job:
    handle: int
    max_tokens: int
    sent: int = 0


class StubScheduler(scheduler_pb2_grpc.SchedulerServiceServicer):
    """One stream per gateway; the jobs of a stream are in no order."""

    def __init__(self, iteration_s: float) -> None:
        self._iteration_s = iteration_s

    async def Serve(  # type: ignore[override]  # the stubs do not know writing to the context
        self, request_iterator: Any, context: aio.ServicerContext[Any, Any]
    ) -> None:
        await context.read()  # Hello
        welcome = scheduler_pb2.Welcome(
            epoch=1,
            shard="0",  # where a gateway looks unless told otherwise
            ready=True,
            model="stub",
            max_model_len=_LONGEST,
            max_job_tokens=_LONGEST,
            durable=True,
        )
        await context.write(scheduler_pb2.ServeResponse(welcome=welcome))
        jobs: dict[int, _Job] = {}
        talking = asyncio.ensure_future(self._talk(context, jobs))
        try:
            while (request := await context.read()) is not aio.EOF:
                match request.WhichOneof("message"):
                    case "submit":
                        submit = request.submit
                        jobs[submit.handle] = _Job(submit.handle, submit.sampling.max_tokens)
                    case "cancel":
                        for handle in request.cancel.handles:
                            jobs.pop(handle, None)
        finally:
            talking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await talking

    async def _talk(self, context: Any, jobs: dict[int, _Job]) -> None:
        due = time.perf_counter()
        while True:
            due = max(due + self._iteration_s, time.perf_counter())
            await asyncio.sleep(due - time.perf_counter())
            if jobs:
                await context.write(scheduler_pb2.ServeResponse(tokens=_batch(jobs)))


def _batch(jobs: dict[int, _Job]) -> scheduler_pb2.TokenBatch:
    """The next token of every job; a first one says that the job is accepted, too."""
    batch = scheduler_pb2.TokenBatch(
        handles=list(jobs),
        first_indexes=[job.sent for job in jobs.values()],
        token_counts=[1] * len(jobs),
        tokens=[_FIRST_TOKEN + (job.handle * 7 + job.sent) % _TOKENS for job in jobs.values()],
        has_logprobs=[0] * len(jobs),
    )
    ended = []
    for job in jobs.values():
        job.sent += 1
        ends = job.sent >= job.max_tokens
        batch.finish_reasons.append(
            sampling_pb2.FINISH_REASON_LENGTH if ends else sampling_pb2.FINISH_REASON_UNSPECIFIED
        )
        if ends:
            ended.append(job.handle)
    for handle in ended:
        del jobs[handle]
    return batch


async def _serve(listen: str, iteration_s: float, ready_file: Path) -> None:
    server = GrpcServer()
    stub = StubScheduler(iteration_s)  # type: ignore[abstract]  # nobody asks for snapshots
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(stub, server.server)
    await server.start(listen)
    await asyncio.to_thread(ready_file.write_text, "{}")
    await server.server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description="A scheduler that only paces tokens.")
    parser.add_argument("--listen", required=True, help="gRPC address")
    parser.add_argument("--iteration", type=float, required=True, help="seconds")
    parser.add_argument("--ready-file", type=Path, required=True)
    arguments = parser.parse_args()
    uvloop.run(_serve(arguments.listen, arguments.iteration, arguments.ready_file))


if __name__ == "__main__":
    main()
