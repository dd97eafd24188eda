"""What happens around every request: its id, its limits, its metrics, its span."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping
from typing import Final

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastserve.gateway.errors import ApiError, InternalError, InvalidRequestError
from fastserve.gateway.metrics import Metrics, outcome_of
from fastserve.gateway.tracing import ANSWER_ROUTES, end_span, server_span

log = structlog.get_logger(__name__)

_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
_ERROR: Final = "error"
_STARTED: Final = "started"
_GONE: Final = 499


def note_error(scope: Scope, error: ApiError) -> None:
    """Remember what the client was (or would have been) told."""
    scope["state"][_ERROR] = error


def started_at(scope: Scope) -> float:
    """When the request came in, by time.perf_counter."""
    started: float = scope["state"][_STARTED]
    return started


class RequestMiddleware:
    """Request id and timing headers, metrics, span, and the last line of defence against bugs."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        scope.setdefault("state", {})[_STARTED] = started
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                elapsed_ms = (time.perf_counter() - started) * 1000
                answer_headers = MutableHeaders(scope=message)
                answer_headers["X-Request-Id"] = request_id
                answer_headers["openai-processing-ms"] = str(round(elapsed_ms))
            await send(message)

        path = _path(scope)
        with (
            structlog.contextvars.bound_contextvars(request_id=request_id),
            server_span(scope["method"], path, request_id, headers) as span,
            self._metrics.http_in_flight.track_inprogress(),
        ):
            try:
                await self._app(scope, receive, send_with_headers)
            except Exception as bug:
                if status:
                    raise  # the server closes the connection
                log.error("a request failed", path=path, exc_info=bug)
                note_error(scope, InternalError())
                await InternalError().response()(scope, receive, send_with_headers)
            finally:
                error = scope["state"].get(_ERROR)
                end_span(span, status, error)
                self._count(scope, status, error)

    def _count(self, scope: Scope, status: int, error: ApiError | None) -> None:
        route = getattr(scope.get("route"), "path", "other")
        gone = error is not None and error.status == _GONE
        shown = _GONE if gone else status
        self._metrics.http_requests.labels(scope["method"], route, shown).inc()
        if route in ANSWER_ROUTES and scope["method"] == "POST":
            self._metrics.incoming.labels(route).inc()
            self._metrics.requests.labels(route, outcome_of(status, error)).inc()
            if gone:
                log.info("the client is gone", status=_GONE, route=route)


class BodyLimitMiddleware:
    """Refuses bodies over a size, at once if the client tells it, else while they are read."""

    def __init__(self, app: ASGIApp, max_body_size: int) -> None:
        self._app = app
        self._max = max_body_size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        if int(length) > self._max:
            error = self._too_large()
            note_error(scope, error)
            await error.response()(scope, receive, send)
            return
        received = 0

        async def receive_some() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max:
                raise self._too_large()
            return message

        await self._app(scope, receive_some, send)

    def _too_large(self) -> ApiError:
        return InvalidRequestError(
            f"the body is larger than {self._max} bytes", status=413, code="request_too_large"
        )


def _request_id(headers: Mapping[str, str]) -> str:
    """The client's, if it is fit for a header and a log line, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"


def _path(scope: Scope) -> str:
    """The path without the prefix that a proxy shows."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
