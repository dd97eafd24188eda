"""Errors of this package become gRPC statuses."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeAlias, TypeVar

import grpc

from fastserve.kv_offload.errors import (
    BlockLost,
    BlockMissing,
    JobExists,
    KvError,
    NotHere,
    PeerRefused,
    PoolFull,
    SlotError,
    StaleCall,
)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
S = TypeVar("S")
Q = TypeVar("Q")
R = TypeVar("R")
_CODES: dict[type[KvError], grpc.StatusCode] = {
    SlotError: grpc.StatusCode.INVALID_ARGUMENT,
    PoolFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    BlockMissing: grpc.StatusCode.NOT_FOUND,
    BlockLost: grpc.StatusCode.DATA_LOSS,
    StaleCall: grpc.StatusCode.FAILED_PRECONDITION,
    NotHere: grpc.StatusCode.NOT_FOUND,
    JobExists: grpc.StatusCode.ALREADY_EXISTS,
    PeerRefused: grpc.StatusCode.UNAVAILABLE,
}


def status_of(error: KvError) -> tuple[grpc.StatusCode, str]:
    """The status of the nearest base class, and the message."""
    code = next(_CODES[base] for base in type(error).__mro__ if base in _CODES)
    hint = ": attach again" if isinstance(error, StaleCall) else ""
    return code, f"{error}{hint}"


def refusing(
    method: Callable[[S, Q, Context], Awaitable[R]],
) -> Callable[[S, Q, Context], Coroutine[Any, Any, R]]:
    """For a call with one answer: a `KvError` ends it with a status."""

    @functools.wraps(method)
    async def call(self: S, request: Q, context: Context) -> R:
        try:
            return await method(self, request, context)
        except KvError as error:
            await context.abort(*status_of(error))

    return call


def stream_refusing(
    method: Callable[[S, Q, Context], AsyncIterator[R]],
) -> Callable[[S, Q, Context], AsyncIterator[R]]:
    """The same for a call with a stream of answers."""

    @functools.wraps(method)
    async def call(self: S, request: Q, context: Context) -> AsyncIterator[R]:
        try:
            async for reply in method(self, request, context):
                yield reply
        except KvError as error:
            await context.abort(*status_of(error))

    return call
