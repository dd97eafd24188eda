"""Gateways: one stream each, jobs by handle, tokens as they become visible.

Nothing is queued per token: a session remembers which jobs have news and packs, whenever the
stream takes a message, what is visible by then. A slow gateway gets fewer, fuller messages and
slows nobody else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final, Protocol

import grpc
import structlog
from grpc import aio

from fastserve.proto.v1 import scheduler_pb2
from fastserve.scheduler.clock import Clock
from fastserve.scheduler.core import Rejection, RejectReason
from fastserve.scheduler.gateway_wire import TokenPacker, accepted, rejected
from fastserve.scheduler.jobs import JobRecord, JobTable

log = structlog.get_logger(__name__)

_MAX_ANSWERS: Final = 1024  # waiting refusals of a gateway that does not read; then we stop reading

Context = aio.ServicerContext[Any, Any]


class JobIntake(Protocol):
    """What gateways may ask for; the engine."""

    def submit(self, submit: scheduler_pb2.Submit) -> JobRecord | Rejection: ...

    def cancel(self, record: JobRecord) -> None: ...


class Session:
    """One gateway stream. Owns the handles of its jobs."""

    def __init__(self, gateway_id: str, welcome: scheduler_pb2.ServeResponse) -> None:
        self.gateway_id = gateway_id
        self.records: dict[int, JobRecord] = {}
        self._welcome: scheduler_pb2.ServeResponse | None = welcome
        self._answers: deque[scheduler_pb2.ServeResponse] = deque()
        self._news: dict[JobRecord, None] = {}
        self._wake = asyncio.Event()
        self._wake.set()
        self._room = asyncio.Event()
        self._room.set()

    def welcome(self, message: scheduler_pb2.ServeResponse) -> None:
        """Tell what changed; an older one that did not leave yet is replaced."""
        self._welcome = message
        self._wake.set()

    def answer(self, message: scheduler_pb2.ServeResponse) -> None:
        self._answers.append(message)
        if len(self._answers) >= _MAX_ANSWERS:
            self._room.clear()
        self._wake.set()

    async def room(self) -> None:
        """Wait while too many answers wait to be read."""
        await self._room.wait()

    def wake(self, record: JobRecord) -> None:
        """Something of `record` became visible."""
        self._news[record] = None
        self._wake.set()

    def hold(self, record: JobRecord, handle: int, next_index: int) -> None:
        """Send `record` here from now on, from output index `next_index`."""
        self.records[handle] = record
        record.attach(self, handle, next_index)
        self.wake(record)

    def drop(self, record: JobRecord) -> None:
        """Another stream takes it, or its end is sent."""
        del self.records[record.handle]
        self._news.pop(record, None)
        record.recipient = None

    async def send(self, context: Context) -> None:
        """Write until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._welcome or self._answers or self._news:
                for message in self._next():
                    await context.write(message)

    def _next(self) -> list[scheduler_pb2.ServeResponse]:
        messages = []
        if self._welcome:
            messages.append(self._welcome)
            self._welcome = None
        messages.extend(self._answers)
        self._answers.clear()
        self._room.set()
        packer = TokenPacker()
        news, self._news = self._news, {}
        for record in news:
            if record.visible < 0:
                continue  # the submission itself is not written yet
            if not record.accepted_sent:
                record.accepted_sent = True
                messages.append(accepted(record.handle))
            if not packer.add(record):
                self._news[record] = None
            elif record.end_visible:
                self.drop(record)
        if not packer.empty:
            messages.append(packer.message)
        return messages


class GatewayHub:
    """All sessions of one leader."""

    def __init__(
        self, intake: JobIntake, jobs: JobTable, clock: Clock, shard: str, epoch: int
    ) -> None:
        self._intake = intake
        self._jobs = jobs
        self._clock = clock
        self._sessions: set[Session] = set()
        self._closing = asyncio.Event()
        self._bug: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._welcome = scheduler_pb2.ServeResponse(
            welcome=scheduler_pb2.Welcome(shard=shard, epoch=epoch, durable=True)
        )

    @property
    def sessions(self) -> int:
        return len(self._sessions)

    @property
    def model(self) -> str:
        """Model name the workers report; empty until one is known."""
        return self._welcome.welcome.model

    def announce(self, *, always: bool = False, **changes: Any) -> None:
        """Change fields of Welcome and tell every gateway, if they differ or `always`."""
        message = scheduler_pb2.ServeResponse()
        message.CopyFrom(self._welcome)
        for name, value in changes.items():
            setattr(message.welcome, name, value)
        if always or message != self._welcome:
            self._welcome = message
            for session in self._sessions:
                session.welcome(message)

    async def watch(self) -> None:
        """Raise what went wrong inside while a message was handled; endless while nothing does."""
        await self._bug

    def close(self) -> None:
        """End every stream with UNAVAILABLE: this process leads no more."""
        self._closing.set()

    async def serve(self, context: Context) -> None:
        """One gateway stream, from Hello to its end."""
        hello = await context.read()
        if hello is aio.EOF or hello.WhichOneof("message") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be Hello")
        session = Session(hello.hello.gateway_id, self._welcome)
        self._sessions.add(session)
        log.info("gateway connected", gateway=session.gateway_id)
        tasks = [
            asyncio.ensure_future(self._receive(session, context)),
            asyncio.ensure_future(session.send(context)),
            asyncio.ensure_future(self._closing.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            self._leave(session)
        for result in results:
            if isinstance(result, InvalidMessage):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(result))
            # Losing the stream is no bug; anything else leaves a state that is not to be trusted.
            if isinstance(result, Exception) and not isinstance(result, aio.BaseError):
                if not self._bug.done():
                    self._bug.set_exception(result)
                raise result
        if self._closing.is_set():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this scheduler leads no more")

    def _leave(self, session: Session) -> None:
        self._sessions.discard(session)
        now = self._clock.now()
        for record in session.records.values():
            self._jobs.orphan(record, now)
        log.info("gateway gone", gateway=session.gateway_id, jobs=len(session.records))

    async def _receive(self, session: Session, context: Context) -> None:
        while True:
            await session.room()
            request = await context.read()
            if request is aio.EOF:
                return
            match request.WhichOneof("message"):
                case "submit":
                    self._submit(session, request.submit)
                case "cancel":
                    for handle in request.cancel.handles:
                        # Unknown: it ended while the message was on its way.
                        if handle in session.records:
                            self._intake.cancel(session.records[handle])
                case "attach":
                    self._attach(session, request.attach)
                case other:
                    raise InvalidMessage(f"unexpected message: {other}")

    def _submit(self, session: Session, submit: scheduler_pb2.Submit) -> None:
        _check_handle(session, submit.handle)
        record = self._intake.submit(submit)
        if isinstance(record, Rejection):
            session.answer(rejected(submit.handle, record))
        else:
            session.hold(record, submit.handle, 0)

    def _attach(self, session: Session, attach: scheduler_pb2.Attach) -> None:
        _check_handle(session, attach.handle)
        record = self._jobs.get(attach.job_id)
        if record is None:
            missing = Rejection(RejectReason.NOT_FOUND, "no such job, or it ended long ago", 0)
            session.answer(rejected(attach.handle, missing))
            return
        if record.recipient is not None:
            record.recipient.drop(record)
        self._jobs.adopt(record)
        session.hold(record, attach.handle, attach.next_index)


class InvalidMessage(Exception):
    """A gateway broke the protocol; its stream ends, its jobs stay for the grace."""


def _check_handle(session: Session, handle: int) -> None:
    if handle in session.records:
        raise InvalidMessage(f"handle {handle} is in use")
