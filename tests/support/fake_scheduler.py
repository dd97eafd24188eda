"""A scheduler that says what the test scripted, and a gateway in front of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from grpc import aio

from fastserve.common.rpc import GrpcServer
from fastserve.gateway.service import Service
from fastserve.gateway.settings import GatewaySettings
from fastserve.gateway.tokenizer import Tokenizer
from fastserve.proto.v1 import sampling_pb2, scheduler_pb2, scheduler_pb2_grpc
from support.waiting import eventually

UNFINISHED = sampling_pb2.FINISH_REASON_UNSPECIFIED
MAX_JOB_TOKENS = 200
MODEL = "test-model"
EOS = 2  # <|im_end|> of the default model

Logprobs = tuple[float, list[int], list[float]]  # of the token, likeliest ids and theirs


@dataclass
class Script:
    """What a job says. With `finish` UNSPECIFIED the job stays silent at the end."""

    tokens: Sequence[int] = ()
    finish: sampling_pb2.FinishReason = sampling_pb2.FINISH_REASON_STOP
    error: str = ""
    logprobs: Sequence[Logprobs] | None = None  # parallel to tokens
    cached: int = 0  # prompt tokens from the prefix cache
    per_batch: int = 1
    pause_s: float = 0.0  # before each batch
    gate: asyncio.Event | None = None  # waited for before the last batch


@dataclass
class Refusal:
    """The answer to a Submit that is not taken."""

    reason: scheduler_pb2.RejectReason
    message: str
    retry_after_s: int = 0


Reply = Script | Refusal
Replies = Callable[[scheduler_pb2.Submit], Reply]


@dataclass
class FakeScheduler(scheduler_pb2_grpc.SchedulerServiceServicer):
    """`reply` decides about each submission; a fixed script, or a function of it."""

    reply: Reply | Replies = field(default_factory=Script)
    ready: bool = True
    address: str = ""
    submits: list[scheduler_pb2.Submit] = field(default_factory=list)
    cancelled: set[str] = field(default_factory=set)  # job ids
    gateways: int = 0
    problems: list[Exception] = field(default_factory=list)  # of scripts
    server: GrpcServer | None = None

    async def Serve(  # type: ignore[override]  # the stubs do not know writing to the context
        self, request_iterator: Any, context: aio.ServicerContext[Any, Any]
    ) -> None:
        hello = await context.read()
        assert hello.WhichOneof("message") == "hello"
        self.gateways += 1
        stream = _Stream(context)
        await stream.write(welcome=self.welcome())
        talking: dict[int, asyncio.Task[None]] = {}
        jobs: dict[int, str] = {}
        try:
            while (request := await context.read()) is not aio.EOF:
                match request.WhichOneof("message"):
                    case "submit":
                        submit = request.submit
                        self.submits.append(submit)
                        jobs[submit.handle] = submit.job_id
                        talking[submit.handle] = asyncio.ensure_future(self._talk(stream, submit))
                    case "attach":
                        handle, job_id = request.attach.handle, request.attach.job_id
                        jobs[handle] = job_id
                        talking[handle] = asyncio.ensure_future(self._again(stream, handle, job_id))
                    case "cancel":
                        for handle in request.cancel.handles:
                            if not talking[handle].done():
                                self.cancelled.add(jobs[handle])
                                talking[handle].cancel()
        finally:
            self.gateways -= 1
            for task in talking.values():
                task.cancel()
            ended = await asyncio.gather(*talking.values(), return_exceptions=True)
            self.problems += [result for result in ended if isinstance(result, Exception)]

    async def Snapshot(
        self, request: scheduler_pb2.SnapshotRequest, context: aio.ServicerContext[Any, Any]
    ) -> scheduler_pb2.SnapshotResponse:
        return scheduler_pb2.SnapshotResponse(epoch=1)

    async def Drain(
        self, request: scheduler_pb2.DrainRequest, context: aio.ServicerContext[Any, Any]
    ) -> scheduler_pb2.DrainResponse:
        return scheduler_pb2.DrainResponse()

    async def die(self) -> None:
        assert self.server is not None
        await self.server.stop(0)

    def welcome(self) -> scheduler_pb2.Welcome:
        return scheduler_pb2.Welcome(
            epoch=1,
            ready=self.ready,
            model=MODEL if self.ready else "",
            max_model_len=MAX_JOB_TOKENS if self.ready else 0,
            max_job_tokens=MAX_JOB_TOKENS if self.ready else 0,
            durable=True,
            shard="0",
        )

    async def _again(self, stream: _Stream, handle: int, job_id: str) -> None:
        """Someone attaches to a job: everything from its beginning, if it was ever submitted."""
        for submit in self.submits:
            if submit.job_id == job_id:
                again = scheduler_pb2.Submit()
                again.CopyFrom(submit)
                again.handle = handle
                await self._talk(stream, again)
                return
        reason = scheduler_pb2.REJECT_REASON_NOT_FOUND
        await stream.write(rejected=scheduler_pb2.Rejected(handle=handle, reason=reason))

    async def _talk(self, stream: _Stream, submit: scheduler_pb2.Submit) -> None:
        reply = self.reply(submit) if callable(self.reply) else self.reply
        handle = submit.handle
        if isinstance(reply, Refusal):
            rejected = scheduler_pb2.Rejected(
                handle=handle,
                reason=reply.reason,
                message=reply.message,
                retry_after_s=reply.retry_after_s,
            )
            await stream.write(rejected=rejected)
            return
        await stream.write(accepted=scheduler_pb2.Accepted(handle=handle))
        for first in range(0, max(1, len(reply.tokens)), reply.per_batch):
            last = min(first + reply.per_batch, len(reply.tokens))
            await asyncio.sleep(reply.pause_s)
            if last == len(reply.tokens) and reply.gate is not None:
                await reply.gate.wait()
            await stream.write(tokens=_batch(reply, handle, first, last))
        if not reply.finish:
            await asyncio.Event().wait()


class _Stream:
    """Writes to a gateway, one message at a time whoever calls."""

    def __init__(self, context: aio.ServicerContext[Any, Any]) -> None:
        self._context = context
        self._turn = asyncio.Lock()

    async def write(self, **message: Any) -> None:
        async with self._turn:
            await self._context.write(scheduler_pb2.ServeResponse(**message))


def _batch(script: Script, handle: int, first: int, last: int) -> scheduler_pb2.TokenBatch:
    ends = last == len(script.tokens)
    batch = scheduler_pb2.TokenBatch(
        handles=[handle],
        first_indexes=[first],
        token_counts=[last - first],
        finish_reasons=[script.finish if ends else UNFINISHED],
        tokens=script.tokens[first:last],
        has_logprobs=[int(script.logprobs is not None)],
    )
    for chosen, ids, logprobs in (script.logprobs or ())[first:last]:
        batch.logprobs.append(chosen)
        batch.top_counts.append(len(ids))
        batch.top_ids.extend(ids)
        batch.top_logprobs.extend(logprobs)
    if script.cached and first == 0 and last:
        batch.cached_entries.append(0)
        batch.cached_tokens.append(script.cached)
    if ends and script.error:
        batch.error_entries.append(0)
        batch.errors.append(script.error)
    return batch


@contextlib.asynccontextmanager
async def running_fake_scheduler() -> AsyncIterator[FakeScheduler]:
    """Listening on a free port."""
    server = GrpcServer()
    scheduler = FakeScheduler(server=server)
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(scheduler, server.server)
    scheduler.address = await server.start("127.0.0.1:0")
    try:
        yield scheduler
    finally:
        await server.stop(0)
    assert not scheduler.problems


class Stack:
    """A gateway on a free port with a fake scheduler behind it, and a client of it."""

    def __init__(self, scheduler: FakeScheduler, service: Service, http: httpx.AsyncClient) -> None:
        self.scheduler = scheduler
        self.service = service
        self.http = http
        self.stop = asyncio.Event()
        self.task = asyncio.ensure_future(service.run(self.stop))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.service.port}"

    def says(self, text: str, **script: Any) -> None:
        """Every job answers with the tokens of `text` and the end token."""
        self.scheduler.reply = self.script(text, **script)

    def script(self, text: str, **fields: Any) -> Script:
        """The tokens of `text` and the end token."""
        tokens = self.service.gateway.tokenizer.encode(text, add_special_tokens=False)
        return Script(tokens=[*tokens, EOS], **fields)

    def metric(self, name: str, **labels: str) -> float:
        return self.service.gateway.metrics.registry.get_sample_value(name, labels) or 0.0

    async def chat(self, content: str = "Hi", /, **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}
        return await self.http.post("/v1/chat/completions", json=body)

    async def complete(self, prompt: Any = "Once", **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "prompt": prompt, **fields}
        return await self.http.post("/v1/completions", json=body)


@contextlib.asynccontextmanager
async def running_gateway(
    folder: Path, tokenizer: Tokenizer, *, connect: bool = True, **settings: Any
) -> AsyncIterator[Stack]:
    """`connect`: wait for the stream to the scheduler; else `settings` may name another one."""
    async with running_fake_scheduler() as scheduler, httpx.AsyncClient(timeout=20) as http:
        values = {"scheduler": [scheduler.address], "port": 0, "shutdown_timeout": 2.0, **settings}
        service = Service(GatewaySettings(model=folder, **values), tokenizer)
        service.listen()
        stack = Stack(scheduler, service, http)
        http.base_url = httpx.URL(stack.url)
        try:
            if connect:
                await eventually(lambda: service.shards.connected or stack.task.done())
            yield stack
        finally:
            stack.stop.set()
            async with asyncio.timeout(30):
                await stack.task
