"""A gateway without HTTP: one Serve stream, tokens collected and checked per job."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from grpc import aio

from fastserve.common import rpc
from fastserve.proto.v1 import sampling_pb2, scheduler_pb2, scheduler_pb2_grpc

WAIT_S = 30.0


class JobView:
    """What a gateway got of one job. Tokens must come in order, each once."""

    def __init__(self, handle: int, job_id: str, first_index: int) -> None:
        self.handle = handle
        self.job_id = job_id
        self.first_index = first_index
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top_ids: list[list[int]] = []
        self.finish: int = sampling_pb2.FINISH_REASON_UNSPECIFIED
        self.error = ""
        self.rejected: scheduler_pb2.Rejected | None = None
        self._answered = asyncio.Event()
        self._changed = asyncio.Condition()

    async def answered(self) -> JobView:
        """Wait for Accepted or Rejected."""
        async with asyncio.timeout(WAIT_S):
            await self._answered.wait()
        return self

    async def accepted(self) -> JobView:
        await self.answered()
        assert self.rejected is None, self.rejected
        return self

    async def refused(self) -> scheduler_pb2.Rejected:
        await self.answered()
        assert self.rejected is not None
        return self.rejected

    async def at_least(self, count: int) -> JobView:
        """Wait until so many tokens are here."""
        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(lambda: len(self.tokens) >= count)
        return self

    async def finished(self, timeout: float = WAIT_S) -> JobView:
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(lambda: self.finish)
        return self

    def answer(self, rejected: scheduler_pb2.Rejected | None) -> None:
        assert not self._answered.is_set(), f"{self.job_id}: answered twice"
        self.rejected = rejected
        self._answered.set()

    async def take(self, first: int, tokens: list[int], finish: int) -> None:
        assert self._answered.is_set(), f"{self.job_id}: tokens before Accepted"
        assert not self.finish, f"{self.job_id}: news after its end"
        assert first == self.first_index + len(self.tokens), f"{self.job_id}: gap or repetition"
        async with self._changed:
            self.tokens += tokens
            self.finish = finish
            self._changed.notify_all()


class GatewayClient:
    """Use `connected`. `problem` is what broke the stream, or a broken promise of the scheduler."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._handles = 0
        self.views: dict[int, JobView] = {}
        self.welcomes: list[scheduler_pb2.Welcome] = []
        self.batches: list[scheduler_pb2.TokenBatch] = []
        self.problem: BaseException | None = None
        self.reading = asyncio.Event()
        self.reading.set()

    @property
    def welcome(self) -> scheduler_pb2.Welcome:
        return self.welcomes[-1]

    async def submit(
        self,
        job_id: str,
        *,
        prompt: int | Sequence[int] = 5,
        seed: int = 1,
        max_tokens: int = 8,
        sampling: dict[str, Any] | None = None,
        **fields: Any,
    ) -> JobView:
        """`prompt`: its tokens, or how many."""
        view = self._view(job_id, 0)
        submit = scheduler_pb2.Submit(
            handle=view.handle,
            job_id=job_id,
            prompt_token_ids=range(1, prompt + 1) if isinstance(prompt, int) else prompt,
            sampling=sampling_pb2.SamplingParams(
                seed=seed, max_tokens=max_tokens, **(sampling or {})
            ),
            **fields,
        )
        await self._call.write(scheduler_pb2.ServeRequest(submit=submit))
        return view

    async def attach(self, job_id: str, next_index: int = 0) -> JobView:
        view = self._view(job_id, next_index)
        attach = scheduler_pb2.Attach(handle=view.handle, job_id=job_id, next_index=next_index)
        await self._call.write(scheduler_pb2.ServeRequest(attach=attach))
        return view

    async def cancel(self, *views: JobView) -> None:
        cancel = scheduler_pb2.Cancel(handles=[view.handle for view in views])
        await self._call.write(scheduler_pb2.ServeRequest(cancel=cancel))

    def die(self) -> None:
        """As if the replica was killed."""
        self._call.cancel()

    def _view(self, job_id: str, first_index: int) -> JobView:
        self._handles += 1
        view = self.views[self._handles] = JobView(self._handles, job_id, first_index)
        return view

    async def read(self) -> None:
        try:
            while True:
                await self.reading.wait()
                response = await self._call.read()
                if response is aio.EOF:
                    return
                await self._take(response)
        except (aio.AioRpcError, AssertionError) as error:
            self.problem = error

    async def _take(self, response: scheduler_pb2.ServeResponse) -> None:
        match response.WhichOneof("message"):
            case "welcome":
                self.welcomes.append(response.welcome)
            case "accepted":
                self.views[response.accepted.handle].answer(None)
            case "rejected":
                self.views[response.rejected.handle].answer(response.rejected)
            case "tokens":
                self.batches.append(response.tokens)
                await self._unpack(response.tokens)

    async def _unpack(self, batch: scheduler_pb2.TokenBatch) -> None:
        token = scored = top = 0
        errors = dict(zip(batch.error_entries, batch.errors, strict=True))
        for entry, handle in enumerate(batch.handles):
            view, count = self.views[handle], batch.token_counts[entry]
            if batch.has_logprobs[entry]:
                for index in range(scored, scored + count):
                    view.logprobs.append(batch.logprobs[index])
                    view.top_ids.append(list(batch.top_ids[top : top + batch.top_counts[index]]))
                    top += batch.top_counts[index]
                scored += count
            view.error = errors.get(entry, "")
            await view.take(
                batch.first_indexes[entry],
                list(batch.tokens[token : token + count]),
                batch.finish_reasons[entry],
            )
            token += count


@contextlib.asynccontextmanager
async def connected(address: str, gateway_id: str = "g") -> AsyncIterator[GatewayClient]:
    """A stream that is welcomed; broken promises show when it is left."""
    async with rpc.channel(address) as channel:
        call = scheduler_pb2_grpc.SchedulerServiceStub(channel).Serve()
        await call.write(
            scheduler_pb2.ServeRequest(hello=scheduler_pb2.Hello(gateway_id=gateway_id))
        )
        client = GatewayClient(call)
        reading = asyncio.ensure_future(client.read())
        try:
            async with asyncio.timeout(WAIT_S):
                while not client.welcomes:
                    if client.problem is not None:
                        raise client.problem
                    await asyncio.sleep(0.001)
            yield client
        finally:
            reading.cancel()
            call.cancel()
    if isinstance(client.problem, AssertionError):
        raise client.problem
