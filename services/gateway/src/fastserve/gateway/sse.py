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
from starlette.types import Receive, Scope, Send

from fastserve.gateway.answers import AnswerFormat, Usage
from fastserve.gateway.disconnect import unless_gone
from fastserve.gateway.errors import ApiError, ClientGoneError, InternalError
from fastserve.gateway.generation import Delta, Generation

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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error: ApiError | None = ClientGoneError()
        try:
            error = await unless_gone(receive, self._write(send))
        except ClientGoneError:
            pass
        finally:
            self._generation.close()
            self._on_end(error)

    async def _write(self, send: Send) -> ApiError | None:
        """Returns the error that ended the stream. Raises `ClientGoneError`."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await self._send(send, start)
        error = None
        try:
            while not self._generation.complete:
                await self._send_body(send, await self._next())
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
        await self._send_body(send, end, more=False)
        return error

    async def _next(self) -> bytes:
        """The events of the next tokens, or a ping. Raises `ApiError`."""
        try:
            async with asyncio.timeout(self._settings.ping_interval):
                deltas = await self._generation.next()
        except TimeoutError:
            self._on_ping()
            return _PING
        return self._events(deltas)

    def _events(self, deltas: Sequence[Delta]) -> bytes:
        chunks = (
            self._answer.chunk(delta, with_usage=self._settings.include_usage) for delta in deltas
        )
        # All of them at once: an id counts for its event, so only the last one may have it.
        events = [b"data: " + chunk + b"\n\n" for chunk in chunks if chunk is not None]
        if events:
            indexes = ",".join(str(choice.tokens - 1) for choice in self._generation.choices)
            events[-1] = b"id: " + indexes.encode() + b"\n" + events[-1]
        return b"".join(events)

    def _usage_event(self) -> bytes:
        if not self._settings.include_usage:
            return b""
        usage = Usage(self._prompt_tokens, self._generation.completion_tokens)
        return b"data: " + self._answer.usage_chunk(usage) + b"\n\n"

    async def _send_body(self, send: Send, body: bytes, *, more: bool = True) -> None:
        if body or not more:
            message = {"type": "http.response.body", "body": body, "more_body": more}
            await self._send(send, message)

    async def _send(self, send: Send, message: dict[str, object]) -> None:
        """Raises `ClientGoneError` if the client does not read."""
        try:
            async with asyncio.timeout(self._settings.send_timeout):
                await send(message)
        except TimeoutError as error:
            raise ClientGoneError from error
