"""Who may call the peer listener: a shared secret in the metadata, mutual TLS, or both."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from fastserve.common.errors import StartupError
from fastserve.common.tls import Tls, load_tls, read_secret
from fastserve.kv_offload.metrics import Metrics
from fastserve.kv_offload.settings import Settings
from fastserve.kv_offload.status import Context

Handler = grpc.RpcMethodHandler
Q = TypeVar("Q")
R = TypeVar("R")
_HEAR_S = 5.0
_KEY = "authorization"
ACCEPTED = ("fastserve-import", "accepted")  # initial metadata of an Import that has its slots


@dataclass(frozen=True, slots=True)
class PeerAuth:
    """What a peer must show, and what we show to peers."""

    token: str = ""
    tls: Tls | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return ((_KEY, f"Bearer {self.token}"),) if self.token else ()

    def permits(self, shown: str | bytes) -> bool:
        """Whether the metadata of a call shows the token, in constant time."""
        given = shown.encode() if isinstance(shown, str) else shown
        return not self.token or hmac.compare_digest(given, f"Bearer {self.token}".encode())


def load_auth(settings: Settings) -> PeerAuth:
    """Read the files named in the settings. Raises `StartupError`."""
    token = ""
    if settings.peer_token_file is not None:
        token = read_secret(settings.peer_token_file).decode(errors="replace").strip()
        if not token:
            raise StartupError(f"{settings.peer_token_file} is empty")
    return PeerAuth(token, load_tls(settings))


class TokenCheck(grpc.aio.ServerInterceptor):
    """Refuses every call that does not show the token."""

    def __init__(self, auth: PeerAuth, metrics: Metrics) -> None:
        self._auth, self._metrics = auth, metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler[Q, R] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler[Q, R] | None:
        handler = await continuation(handler_call_details)
        shown = dict(handler_call_details.invocation_metadata or ()).get(_KEY, "")
        if handler is None or self._auth.permits(shown):
            return handler
        self._metrics.failed("peer_auth")
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(_refuse_stream)
        return grpc.unary_unary_rpc_method_handler(_refuse)


async def _refuse(_: object, context: Context) -> Any:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the peer token is missing or wrong")


async def _refuse_stream(requests: AsyncIterator[object], context: Context) -> Any:
    # A caller that is still writing when the call ends may not see the status: hear it out once.
    with contextlib.suppress(TimeoutError, StopAsyncIteration):
        await asyncio.wait_for(anext(requests), _HEAR_S)
    await _refuse(requests, context)
