"""Probes, version and metrics: open to everybody, so that no probe needs a key."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Final

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from fastserve.gateway.errors import UnavailableError
from fastserve.gateway.openapi import READY_ERRORS
from fastserve.gateway.state import gateway_of

VERSION: Final = version("fastserve-gateway")

router = APIRouter(tags=["Status"])


@router.get("/health", summary="Whether this process works, and what it sees of the scheduler")
async def health(request: Request) -> dict[str, Any]:
    shards = gateway_of(request).shards
    return {"status": "ok", "scheduler_connected": shards.connected, "ready": shards.ready}


@router.get("/livez", summary="Whether this process works")
async def livez() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="Whether requests are served", responses=READY_ERRORS)
async def readyz(request: Request) -> dict[str, str]:
    gateway = gateway_of(request)
    gateway.check_open()
    shards = gateway.shards
    if not shards.connected:
        raise UnavailableError("there is no stream to a scheduler", "scheduler_unavailable")
    if not shards.ready:
        raise UnavailableError("the scheduler has no worker", "no_workers")
    return {"status": "ready"}


@router.get("/version", summary="Version of the gateway")
async def get_version() -> dict[str, str]:
    return {"version": VERSION}


@router.get("/metrics", summary="Metrics in Prometheus' text format", response_class=Response)
async def metrics(request: Request) -> Response:
    content = generate_latest(gateway_of(request).metrics.registry)
    return Response(content, headers={"Content-Type": CONTENT_TYPE_LATEST})
