"""The gateway's one stream to the scheduler of a shard, which carries all of its jobs there.

The stream may break at any moment; the job table is what counts. On every new stream each job is
introduced again: with Attach and the index of the next token if the scheduler has it, with Submit
if it never answered. Sending a Submit twice is safe because job ids are unique: a scheduler that
has the job answers ALREADY_EXISTS, which is followed by Attach. So requests see a pause, never a
lost or repeated token. A job that the scheduler lost is submitted again if no token of it was seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import structlog
from grpc import aio

from fastserve.common import rpc
from fastserve.common.tls import Tls
from fastserve.gateway.jobs import (
    GatewayStoppingError,
    Job,
    JobRefusedError,
    SchedulerLostError,
    unpack,
)
from fastserve.proto.v1 import scheduler_pb2, scheduler_pb2_grpc

log = structlog.get_logger(__name__)

_WELCOME_TIMEOUT_S: Final = 3.0
_BACKOFF_S: Final = (0.05, 0.5)  # first and longest pause between two rounds of the addresses
_FLUSH_TIMEOUT_S: Final = 1.0
_GO_ON: Final = (
    "the gateway is shutting down: the same request with X-FastServe-Answer and Last-Event-ID goes "
    "on at another one"
)
_BREAKS: Final = (aio.AioRpcError, asyncio.InvalidStateError, TimeoutError, ConnectionError)


class SchedulerClient:
    """Submit, follow and cancel jobs. `run` keeps the stream up until it is cancelled."""

    def __init__(
        self,
        shard: str,
        addresses: Sequence[str],
        gateway_id: str,
        *,
        answer_timeout_s: float,
        reattach_timeout_s: float,
        tls: Tls | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`addresses`: of the leader and its standbys, in any order.

        `on_change` is called whenever `connected` or `welcome` changed.
        """
        self.shard = shard
        self._addresses = addresses
        self._gateway_id = gateway_id
        self._answer_timeout_s = answer_timeout_s
        self._reattach_timeout_s = reattach_timeout_s
        self._tls = tls
        self._on_change = on_change
        self._jobs: dict[int, Job] = {}
        self._handles = itertools.count(1)
        self._stream: _Stream | None = None
        self._welcomed = asyncio.Event()
        self._down_since = time.monotonic()
        self.welcome: scheduler_pb2.Welcome | None = None  # the last one, also while disconnected
        self._heard = 0  # messages of the scheduler
        self.losses = 0  # streams that broke
        self._others = 0  # jobs of other gateways there, as of the last Welcome
        self._expected = 0  # jobs that come and are not submitted yet

    @property
    def connected(self) -> bool:
        return self._stream is not None

    @property
    def ready(self) -> bool:
        """The scheduler is there and has a worker."""
        return self._stream is not None and self.welcome is not None and self.welcome.ready

    @property
    def model(self) -> str:
        """Name of the model as the workers report it; "" while none is known."""
        return self.welcome.model if self.welcome is not None else ""

    @property
    def load(self) -> float:
        """Jobs of the shard for each that it runs at once.

        Our own jobs are counted as they are, those of others as of the last Welcome.
        """
        rows = self.welcome.max_num_seqs if self.welcome is not None else 0
        return (self._others + self.jobs + self._expected) / max(1, rows)

    def expect(self, jobs: int) -> None:
        """So many jobs will be submitted in a moment, unless their request turns out wrong."""
        self._expected += jobs

    @property
    def jobs(self) -> int:
        """Jobs that requests follow."""
        return sum(not job.dropped for job in self._jobs.values())

    async def limits(self) -> scheduler_pb2.Welcome:
        """The last Welcome; the first one is waited for. Raises `SchedulerLostError`."""
        if self.welcome is None:
            try:
                async with asyncio.timeout(self._patience()):
                    await self._welcomed.wait()
            except TimeoutError as error:
                raise SchedulerLostError("the scheduler cannot be reached") from error
        assert self.welcome is not None
        return self.welcome

    async def submit(self, submit: scheduler_pb2.Submit, wake: asyncio.Event) -> Job:
        """Hand a job over and wait for the answer; the handle is filled in here.

        `wake` is set whenever there is something to take from the job. Raises `JobRefusedError`
        or `SchedulerLostError`; if the caller is cancelled, so is the job.
        """
        self._expected = max(0, self._expected - 1)
        submit.handle = next(self._handles)
        return await self._answered(Job(submit.handle, submit.job_id, submit, wake))

    async def attach(self, job_id: str, wake: asyncio.Event) -> Job:
        """Take a job over that this or another gateway submitted; its tokens come from index 0.

        Raises `JobRefusedError` (NOT_FOUND) or `SchedulerLostError`.
        """
        return await self._answered(Job(next(self._handles), job_id, None, wake))

    async def _answered(self, job: Job) -> Job:
        patience = self._patience()
        self._jobs[job.handle] = job
        self._introduce(job)
        try:
            while not job.answer.done():
                heard = self._heard
                await asyncio.wait((job.answer,), timeout=patience)
                # A burst may keep this process from reading: what counts is silence.
                if not job.answer.done() and self._heard == heard:
                    raise SchedulerLostError("the scheduler does not answer")
            job.answer.result()
        except BaseException:
            self.cancel(job)
            raise
        return job

    def _patience(self) -> float:
        """Seconds to wait for an answer. Raises `SchedulerLostError` if there is no point in it.

        Waiting makes sense while the scheduler may be restarting, not once it is gone for long.
        """
        if self._stream is not None:
            return self._answer_timeout_s
        patience = self._answer_timeout_s - (time.monotonic() - self._down_since)
        if patience <= 0:
            raise SchedulerLostError("the scheduler cannot be reached")
        return patience

    def cancel(self, job: Job) -> None:
        """Stop a job, if it has not ended; nothing more is delivered."""
        if job.handle not in self._jobs or job.dropped:
            return
        job.dropped = True
        if not job.sent:
            del self._jobs[job.handle]
        elif self._stream is not None:
            self._stream.send(_cancel(job))

    def detach(self, job: Job, grace_s: float) -> None:
        """Leave a job running for `grace_s` seconds, for another `attach`; then cancel it.

        If it is attached to meanwhile, here or elsewhere, the scheduler knows it by another handle
        and the late Cancel means nothing. If the stream breaks, the scheduler's own grace counts.
        """
        if job.handle in self._jobs and not job.dropped:
            job.dropped = job.detached = True
            if self._stream is None:
                del self._jobs[job.handle]  # the next stream would carry a Cancel
            else:
                asyncio.get_running_loop().call_later(grace_s, self._end_grace, job)

    def _end_grace(self, job: Job) -> None:
        if self._jobs.pop(job.handle, None) is not None and self._stream is not None:
            self._stream.send(_cancel(job))

    async def run(self) -> None:
        """Connect, and again whenever the stream breaks, to one address after another."""
        pause = _BACKOFF_S[0]
        failures = 0  # one after the other
        try:
            for address in itertools.cycle(self._addresses):
                try:
                    await self._session(address)
                except _BREAKS as error:
                    log.info(
                        "no stream to the scheduler",
                        shard=self.shard,
                        address=address,
                        reason=_reason(error),
                    )
                if self._stream is not None:
                    self._lose_stream()
                    pause, failures = _BACKOFF_S[0], 0
                failures += 1
                if time.monotonic() - self._down_since > self._reattach_timeout_s:
                    self._fail_all("the scheduler cannot be reached")
                if failures % len(self._addresses) == 0:
                    # Spread, so that the gateways of a dead leader do not come back all at once.
                    await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                    pause = min(2 * pause, _BACKOFF_S[1])
        finally:
            self._lose_stream()
            self._fail_all("the gateway is shutting down")

    async def close(self) -> None:
        """Requests get `GatewayStoppingError`; their jobs are cancelled, but for those that clients
        can go on with elsewhere, which the scheduler keeps for its grace."""
        for job in list(self._jobs.values()):
            if job.resumable and job.sent:
                job.dropped = True
                job.fail(GatewayStoppingError(_GO_ON))
            else:
                self.cancel(job)  # which forgets a job that no stream carried yet
                job.fail(GatewayStoppingError("the gateway is shutting down"))
        self._jobs.clear()
        if self._stream is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FLUSH_TIMEOUT_S):
                    await self._stream.flushed()

    async def _session(self, address: str) -> None:
        """One stream, from Hello to its end, which is one of `_BREAKS`."""
        async with rpc.channel(address, self._tls) as channel:
            call = scheduler_pb2_grpc.SchedulerServiceStub(channel).Serve()
            try:
                async with asyncio.timeout(_WELCOME_TIMEOUT_S):
                    hello = scheduler_pb2.Hello(gateway_id=self._gateway_id)
                    await call.write(scheduler_pb2.ServeRequest(hello=hello))
                    response: Any = await call.read()
                if response is aio.EOF or response.WhichOneof("message") != "welcome":
                    raise ConnectionError("the scheduler did not say Welcome")
                if response.welcome.shard != self.shard:
                    raise ConnectionError(f"it leads shard {response.welcome.shard!r}")
                log.info(
                    "connected to the scheduler",
                    shard=self.shard,
                    address=address,
                    jobs=len(self._jobs),
                )
                self._stream = _Stream(call)
                self._take(response)
                for job in self._jobs.values():
                    self._introduce(job)
                writing = asyncio.ensure_future(self._stream.write_all())
                try:
                    await self._read_all(call)
                finally:
                    writing.cancel()
                    await asyncio.gather(writing, return_exceptions=True)
            finally:
                call.cancel()

    def _introduce(self, job: Job) -> None:
        """Tell the scheduler about a job that this stream has not carried yet."""
        if self._stream is None:
            return  # the next stream will
        job.sent = True
        if job.known or job.dropped:
            attach = scheduler_pb2.Attach(
                handle=job.handle, job_id=job.job_id, next_index=job.next_index
            )
            self._stream.send(scheduler_pb2.ServeRequest(attach=attach))
        else:
            self._stream.send(scheduler_pb2.ServeRequest(submit=job.submit))
        if job.dropped:
            self._stream.send(_cancel(job))

    async def _read_all(self, call: Any) -> None:
        while True:
            response = await call.read()
            if response is aio.EOF:
                raise ConnectionError("the scheduler ended the stream")
            self._take(response)

    def _take(self, response: scheduler_pb2.ServeResponse) -> None:
        self._heard += 1
        match response.WhichOneof("message"):
            case "tokens":
                self._deliver(response.tokens)
            case "accepted":
                if job := self._jobs.get(response.accepted.handle):
                    job.accept()
            case "rejected":
                if job := self._jobs.get(response.rejected.handle):
                    self._rejected(job, response.rejected)
            case "welcome":
                self.welcome = response.welcome
                self._others = max(0, self.welcome.live_jobs - self.jobs)
                self._expected = 0  # nobody says when a request turned out wrong
                self._welcomed.set()
                self._on_change()

    def _deliver(self, batch: scheduler_pb2.TokenBatch) -> None:
        for entry in unpack(batch):
            job = self._jobs.get(entry.handle)
            if job is None:
                continue  # forgotten while the batch was on its way
            job.accept()
            try:
                job.deliver(entry)
            except ValueError as error:
                log.error("the scheduler left tokens out", reason=str(error))
                self.cancel(job)
                job.fail(SchedulerLostError("tokens of the answer were lost"))
            if entry.finish:
                del self._jobs[job.handle]

    def _rejected(self, job: Job, rejected: scheduler_pb2.Rejected) -> None:
        match rejected.reason:
            case scheduler_pb2.REJECT_REASON_ALREADY_EXISTS if not job.known:
                # Answers a Submit that was sent for the second time.
                job.known = True
                self._introduce(job)
                return
            case scheduler_pb2.REJECT_REASON_NOT_FOUND if job.known and not job.dropped:
                # Answers the Attach after a reconnect: lost with the former scheduler.
                if job.submit is not None:
                    job.known = False
                    self._introduce(job)
                    return
        del self._jobs[job.handle]
        if job.answer.done():
            job.fail(SchedulerLostError("the answer was lost with the scheduler"))
        else:
            job.fail(JobRefusedError(rejected))

    def _lose_stream(self) -> None:
        if self._stream is None:
            return
        self._stream = None
        self._down_since = time.monotonic()
        self.losses += 1
        # Whoever takes a detached job over must not lose it to us again.
        self._jobs = {handle: job for handle, job in self._jobs.items() if not job.detached}
        self._on_change()

    def _fail_all(self, message: str) -> None:
        for job in self._jobs.values():
            job.fail(SchedulerLostError(message))
        self._jobs.clear()


class _Stream:
    """The sending side of one stream. Messages leave in order; `send` never waits.

    What can wait here is bounded by the requests that are served at the same time.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._outbox: deque[scheduler_pb2.ServeRequest] = deque()
        self._wake = asyncio.Event()
        self._empty = asyncio.Event()

    def send(self, message: scheduler_pb2.ServeRequest) -> None:
        self._outbox.append(message)
        self._empty.clear()
        self._wake.set()

    async def write_all(self) -> None:
        """Write until cancelled or the call ends."""
        while True:
            while self._outbox:
                await self._call.write(self._outbox.popleft())
            self._empty.set()
            await self._wake.wait()
            self._wake.clear()

    async def flushed(self) -> None:
        """Wait until everything is written."""
        await self._empty.wait()


def _cancel(job: Job) -> scheduler_pb2.ServeRequest:
    return scheduler_pb2.ServeRequest(cancel=scheduler_pb2.Cancel(handles=[job.handle]))


def _reason(error: Exception) -> str:
    if isinstance(error, aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
