"""A scheduler whose side of each stream the test itself plays, message by message."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from grpc import StatusCode, aio

from fastserve.common.rpc import GrpcServer
from fastserve.gateway.jobs import Job
from fastserve.gateway.scheduler_client import SchedulerClient
from fastserve.proto.v1 import sampling_pb2, scheduler_pb2, scheduler_pb2_grpc

WAIT_S = 30.0  # bound of every wait
UNFINISHED = sampling_pb2.FINISH_REASON_UNSPECIFIED
STOP = sampling_pb2.FINISH_REASON_STOP


class Session:
    """The scheduler's end of one stream."""

    def __init__(self, context: aio.ServicerContext[Any, Any]) -> None:
        self._context = context
        self.over = asyncio.Event()  # ends the stream
        self.status = StatusCode.OK  # it ends with

    async def read(self) -> scheduler_pb2.ServeRequest | None:
        """The gateway's next message; None if it ended the stream."""
        async with asyncio.timeout(WAIT_S):
            request = await self._context.read()
        return None if request is aio.EOF else request

    async def receive(self, kind: str) -> Any:
        """The gateway's next message, which must be a `kind`."""
        request = await self.read()
        assert request is not None, f"the stream ended instead of {kind}"
        assert request.WhichOneof("message") == kind, request
        return getattr(request, kind)

    async def send(self, **message: Any) -> None:
        await self._context.write(scheduler_pb2.ServeResponse(**message))

    async def welcome(self, **fields: Any) -> None:
        await self.send(welcome=scheduler_pb2.Welcome(**{"epoch": 1, "shard": "0", **fields}))

    async def accept(self, handle: int) -> None:
        await self.send(accepted=scheduler_pb2.Accepted(handle=handle))

    async def reject(self, handle: int, reason: scheduler_pb2.RejectReason, **fields: Any) -> None:
        await self.send(rejected=scheduler_pb2.Rejected(handle=handle, reason=reason, **fields))

    async def tokens(
        self,
        handle: int,
        first_index: int,
        tokens: Sequence[int],
        finish: sampling_pb2.FinishReason = UNFINISHED,
    ) -> None:
        """A batch with one entry."""
        await self.send(
            tokens=scheduler_pb2.TokenBatch(
                handles=[handle],
                first_indexes=[first_index],
                token_counts=[len(tokens)],
                finish_reasons=[finish],
                tokens=tokens,
                has_logprobs=[0],
            )
        )

    def end(self, status: StatusCode = StatusCode.OK) -> None:
        self.status = status
        self.over.set()


class ScriptedScheduler(scheduler_pb2_grpc.SchedulerServiceServicer):
    """Waits for gateways; every stream is handed to the test."""

    def __init__(self, server: GrpcServer) -> None:
        self.server = server
        self.address = ""
        self._sessions: asyncio.Queue[Session] = asyncio.Queue()

    async def Serve(  # type: ignore[override]  # the stubs do not know writing to the context
        self, request_iterator: Any, context: aio.ServicerContext[Any, Any]
    ) -> None:
        session = Session(context)
        self._sessions.put_nowait(session)
        await session.over.wait()
        if session.status != StatusCode.OK:
            await context.abort(session.status, "as scripted")

    async def called(self) -> tuple[Session, scheduler_pb2.Hello]:
        """The next stream, to which nothing was said yet."""
        async with asyncio.timeout(WAIT_S):
            session = await self._sessions.get()
        return session, await session.receive("hello")

    async def session(self) -> Session:
        """The next stream, welcomed."""
        session, _ = await self.called()
        await session.welcome(ready=True)
        return session


@contextlib.asynccontextmanager
async def running_scheduler() -> AsyncIterator[ScriptedScheduler]:
    """Listening on a free port."""
    server = GrpcServer()
    scheduler = ScriptedScheduler(server)  # type: ignore[abstract]  # nobody asks for snapshots
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(scheduler, server.server)
    scheduler.address = await server.start("127.0.0.1:0")
    try:
        yield scheduler
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def running_client(
    *addresses: str,
    answer_timeout_s: float = WAIT_S,
    reattach_timeout_s: float = WAIT_S,
    on_change: Callable[[], None] = lambda: None,
) -> AsyncIterator[SchedulerClient]:
    """A client that connects, until the block ends."""
    client = SchedulerClient(
        "0",
        addresses,
        "gateway-1",
        answer_timeout_s=answer_timeout_s,
        reattach_timeout_s=reattach_timeout_s,
        on_change=on_change,
    )
    running = asyncio.ensure_future(client.run())
    try:
        yield client
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


class Follower:
    """A request: submits a job or attaches to one, and takes what comes whenever it is woken."""

    def __init__(self, client: SchedulerClient) -> None:
        self._client = client
        self._wake = asyncio.Event()
        self.tokens: list[int] = []

    def submit(self, job_id: str, **fields: Any) -> asyncio.Task[Job]:
        submit = scheduler_pb2.Submit(job_id=job_id, **fields)
        return asyncio.ensure_future(self._client.submit(submit, self._wake))

    def attach(self, job_id: str) -> asyncio.Task[Job]:
        return asyncio.ensure_future(self._client.attach(job_id, self._wake))

    async def follow(self, job: Job, count: int | None = None) -> list[int]:
        """All tokens so far, once there are `count` of them or (None) the job has ended."""
        async with asyncio.timeout(WAIT_S):
            while True:
                self._wake.clear()
                self.tokens += job.take()[0]
                if job.ended if count is None else len(self.tokens) >= count:
                    return self.tokens
                await self._wake.wait()


async def started(
    client: SchedulerClient, session: Session, *tokens: int, job_id: str = "a"
) -> tuple[Follower, Job]:
    """A job that was accepted and said `tokens`."""
    follower = Follower(client)
    submitting = follower.submit(job_id, prompt_token_ids=[7, 8])
    submit = await session.receive("submit")
    assert submit.job_id == job_id
    await session.accept(submit.handle)
    job = await submitting
    if tokens:
        await session.tokens(job.handle, 0, tokens)
    await follower.follow(job, len(tokens))
    return follower, job


async def assert_serves(client: SchedulerClient, session: Session) -> None:
    """Two jobs from beginning to end; the next messages are their Submits and nothing else.

    By the end of the first one the client has read all that was said before, so what it says to
    that would come before the second one.
    """
    for job_id in ("first", "second"):
        follower, job = await started(client, session, 1, job_id=job_id)
        await session.tokens(job.handle, 1, [2], STOP)
        assert await follower.follow(job) == [1, 2]
    assert client.jobs == 0
