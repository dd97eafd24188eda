"""The ASGI application."""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from fastserve.gateway.errors import ApiError, ClientGoneError, InvalidRequestError
from fastserve.gateway.metrics import Metrics
from fastserve.gateway.middleware import BodyLimitMiddleware, RequestMiddleware, note_error
from fastserve.gateway.openapi import document
from fastserve.gateway.routes import chat, completions, models, status, tokens
from fastserve.gateway.scheduler_client import SchedulerClient
from fastserve.gateway.state import Gateway

_CODES: Final = {404: "not_found", 405: "method_not_allowed"}


def create_app(gateway: Gateway) -> FastAPI:
    """All routes around one gateway; `gateway.shards` is run by the caller."""
    app = FastAPI(
        title="FastServe",
        version=status.VERSION,
        description="OpenAI-compatible API of a FastServe cluster.",
        # Spans and metrics are ours: one span per request.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.gateway = gateway
    app.openapi = lambda: document(app)  # type: ignore[method-assign]  # as FastAPI documents it
    for routes in (chat, completions, models, tokens, status):
        app.include_router(routes.router)
    # The last one added is the outermost.
    app.add_middleware(BodyLimitMiddleware, max_body_size=gateway.settings.max_body_size)
    app.add_middleware(RequestMiddleware, metrics=gateway.metrics)
    app.add_exception_handler(ApiError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    app.add_exception_handler(ClientDisconnect, _on_error)
    _watch(gateway)
    return app


async def _on_error(request: Request, raised: Exception) -> Response:
    error = _api_error(request, raised)
    note_error(request.scope, error)
    return error.response()


def _api_error(request: Request, raised: Exception) -> ApiError:
    if isinstance(raised, ApiError):
        return raised
    if isinstance(raised, HTTPException):
        where = f"{request.method} {request.url.path}"[:200]
        return InvalidRequestError(
            f"{HTTPStatus(raised.status_code).phrase}: {where}",
            status=raised.status_code,
            code=_CODES.get(raised.status_code),
            headers=raised.headers,
        )
    return ClientGoneError()


def _watch(gateway: Gateway) -> None:
    """Metrics that are read off the client when they are asked for."""
    for client in gateway.shards:
        _watch_shard(client, gateway.metrics)


def _watch_shard(client: SchedulerClient, metrics: Metrics) -> None:
    metrics.connected.labels(client.shard).set_function(lambda: client.connected)
    metrics.ready.labels(client.shard).set_function(lambda: client.ready)
    metrics.stream_losses.labels(client.shard).set_function(lambda: client.losses)
    metrics.jobs.labels(client.shard).set_function(lambda: client.jobs)
