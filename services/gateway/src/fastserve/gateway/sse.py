"""Answers as server-sent events.

    id: 17
    data: {"object": "chat.completion.chunk", ...}

The id is the index of the last output token that the stream has consumed by then, of every choice
(`17,4` for two). A silent stream gets comments, so that proxies do not cut it. An error after the
first byte is an event of its own and the last one; `[DONE]` ends complete answers only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from fastserve.gateway.answers import AnswerFormat, Usage
from fastserve.gateway.disconnect import unless_gone
from fastserve.gateway.errors import ApiError, ClientGoneError, InternalError
from fastserve.gateway.generation import Delta, Generation
from fastserve.gateway.stream_watch import StreamWatch

log = structlog.get_logger(__name__)

_PING: Final = b": ping\n\n"
_DONE: Final = b"data: [DONE]\n\n"
_HEADERS: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True)
class StreamSettings:
    """Times in seconds."""

    ping_interval: float
    send_timeout: float
    include_usage: bool


class EventStream(Response):
    """The response to a request whose jobs are accepted."""

    media_type = "text/event-stream"

    def __init__(
        self,
        generation: Generation,
        answer: AnswerFormat,
        prompt_tokens: int,
        settings: StreamSettings,
        *,
        on_ping: Callable[[], None],
        on_end: Callable[[ApiError | None], None],
    ) -> None:
        """`on_end` hears how it went: None is a complete answer."""
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._generation = generation
        self._answer = answer
        self._prompt_tokens = prompt_tokens
        self._settings = settings
        self._on_ping = on_ping
        self._on_end = on_end
        self._silent = False  # a ping is due

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error: ApiError | None = ClientGoneError()
        try:
            error = await unless_gone(receive, self._watched(send))
        except ClientGoneError:
            pass
        finally:
            self._generation.close()
            self._on_end(error)

    async def _watched(self, send: Send) -> ApiError | None:
        """Write, with pings while there is silence. Raises `ClientGoneError` if nobody reads."""
        settings = self._settings
        watch = StreamWatch(settings.ping_interval, settings.send_timeout, self._nudge)

        async def watched_send(message: Message) -> None:
            watch.send_begins()
            await send(message)
            watch.send_ends()

        try:
            return await self._write(watched_send)
        except asyncio.CancelledError:
            if watch.stuck:
                raise ClientGoneError from None
            raise
        finally:
            watch.stop()

    async def _write(self, send: Send) -> ApiError | None:
        """Returns the error that ended the stream. Raises `ClientGoneError`."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        error = None
        try:
            while not self._generation.complete:
                if body := await self._next():
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            end = self._usage_event() + _DONE
        except ClientGoneError:
            raise
        except ApiError as failure:
            error = failure
        except Exception as failure:  # the status is sent: say it in the stream
            log.error("a stream failed", exc_info=failure)
            error = InternalError()
        if error is not None:
            end = b"data: " + error.body() + b"\n\n"
        await send({"type": "http.response.body", "body": end, "more_body": False})
        return error

    def _nudge(self) -> None:
        self._silent = True
        self._generation.nudge()

    async def _next(self) -> bytes:
        """The events of the next tokens, or a ping, or nothing to show yet. Raises `ApiError`."""
        deltas = await self._generation.next()
        silent, self._silent = self._silent, False
        if silent and not deltas:
            self._on_ping()
            return _PING
        return self._events(deltas)

    def _events(self, deltas: Sequence[Delta]) -> bytes:
        with_usage = self._settings.include_usage
        chunks = [self._answer.chunk(delta, with_usage=with_usage) for delta in deltas]
        # All of them at once: an id counts for its event, so only the last one may have it.
        events = [b"data: %b\n\n" % chunk for chunk in chunks if chunk is not None]
        if events:
            choices = self._generation.choices
            indexes = ",".join([str(choice.tokens - 1) for choice in choices])
            events[-1] = b"id: %b\n%b" % (indexes.encode(), events[-1])
        return b"".join(events)

    def _usage_event(self) -> bytes:
        if not self._settings.include_usage:
            return b""
        generation = self._generation
        usage = Usage(self._prompt_tokens, generation.completion_tokens, generation.cached_tokens)
        return b"data: " + self._answer.usage_chunk(usage) + b"\n\n"
