"""Kubernetes: the pods behind a Service as worker groups, and what their deletion would cost.

Needs the package `kubernetes` (extra `kubernetes` of the scheduler), and of the API server: get,
list and watch of endpointslices, and patch of pods for the costs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp
import structlog
from kubernetes.aio import client, config, watch

from fastserve.common.errors import StartupError
from fastserve.scheduler.discovery import Endpoint, join

log = structlog.get_logger(__name__)

DELETION_COST: Final = "controller.kubernetes.io/pod-deletion-cost"
_NAMESPACE_FILE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_WATCH_S: Final = 240  # a watch is begun anew after so long: a dead connection shows by then
_PAUSES_S: Final = (0.2, 10.0)
_TIMEOUT_S: Final = 10.0
_TROUBLE: Final = (client.ApiException, aiohttp.ClientError, OSError, TimeoutError)
_GONE: Final = 410  # what was watched from is too long ago: list again
# A cost is written when it differs by this share from the one written, and not more often.
_CHANGE: Final = 0.1
_EVERY_S: Final = 10.0


def connect() -> client.ApiClient:
    """As the service account of this pod. Raises `StartupError` outside of a cluster."""
    try:
        config.load_incluster_config()  # type: ignore[no-untyped-call]
    except config.ConfigException as error:
        raise StartupError(f"--discovery kubernetes only works in a cluster: {error}") from error
    return client.ApiClient()


def own_namespace() -> str:
    """That of this pod. Raises `StartupError` outside of a cluster."""
    try:
        return _NAMESPACE_FILE.read_text().strip()
    except OSError as error:
        raise StartupError(
            f"--kubernetes-namespace is needed: {_NAMESPACE_FILE} cannot be read"
        ) from error


class EndpointSlices:
    """The pods behind a Service, by its EndpointSlices."""

    def __init__(self, api: client.ApiClient, service: str, namespace: str, port: str) -> None:
        """port: its name or its number."""
        self._api = client.DiscoveryV1Api(api)
        self._selector = f"kubernetes.io/service-name={service}"
        self._namespace, self._port = namespace, port
        self._slices: dict[str, frozenset[Endpoint]] = {}

    async def watch(self) -> AsyncIterator[frozenset[Endpoint]]:
        pause = _PAUSES_S[0]
        last: frozenset[Endpoint] | None = None
        while True:
            try:
                async for found in self._changes():
                    pause = _PAUSES_S[0]
                    if found != last:
                        yield found
                        last = found
            except _TROUBLE as error:
                if not (isinstance(error, client.ApiException) and error.status == _GONE):
                    log.warning("cannot watch the endpoints of workers", reason=_reason(error))
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, _PAUSES_S[1])

    async def _changes(self) -> AsyncIterator[frozenset[Endpoint]]:
        """All of them as listed, and after each change, until the watch ends."""
        where: dict[str, Any] = {"label_selector": self._selector}
        listed: Any = await self._api.list_namespaced_endpoint_slice(
            self._namespace, _request_timeout=_TIMEOUT_S, **where
        )
        self._slices = {one.metadata.name: self._endpoints(one) for one in listed.items}
        yield self._all()
        async with watch.Watch() as watching:  # type: ignore[no-untyped-call]
            async for event in watching.stream(
                self._api.list_namespaced_endpoint_slice,
                self._namespace,
                resource_version=listed.metadata.resource_version,
                timeout_seconds=_WATCH_S,
                _request_timeout=_WATCH_S + _TIMEOUT_S,
                **where,
            ):
                name = event["object"].metadata.name
                if event["type"] == "DELETED":
                    self._slices.pop(name, None)
                else:
                    self._slices[name] = self._endpoints(event["object"])
                yield self._all()

    def _all(self) -> frozenset[Endpoint]:
        return frozenset().union(*self._slices.values())

    def _endpoints(self, found: Any) -> frozenset[Endpoint]:
        """Those that are ready, or are about to end and may have jobs still."""
        ports = [one.port for one in found.ports or () if self._port in (one.name, str(one.port))]
        return frozenset(
            Endpoint(join(address, port), _pod(one.target_ref))
            for port in ports
            for one in found.endpoints or ()
            if one.conditions.ready is not False or one.conditions.terminating
            for address in one.addresses
        )


class DeletionCosts:
    """Keeps the annotation by which a ReplicaSet picks the pods to delete first, the cheapest."""

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self._api = client.CoreV1Api(api)
        self._namespace = namespace
        self._written: dict[str, tuple[int, float]] = {}  # pod -> cost, when

    async def update(self, costs: Mapping[str, int], now: float) -> None:
        """Write the costs that changed; those of a pod at most every ten seconds."""
        for pod in set(self._written) - set(costs):
            del self._written[pod]
        for pod, cost in costs.items():
            known = self._written.get(pod)
            if known is not None:
                before, at = known
                same = abs(cost - before) <= _CHANGE * abs(before)
                if same or now - at < _EVERY_S:
                    continue
            await self._write(pod, cost)
            self._written[pod] = (cost, now)

    async def _write(self, pod: str, cost: int) -> None:
        body = {"metadata": {"annotations": {DELETION_COST: str(cost)}}}
        try:
            await self._api.patch_namespaced_pod(
                pod, self._namespace, body, _request_timeout=_TIMEOUT_S
            )
        except _TROUBLE as error:
            log.warning("pod-deletion-cost not written", pod=pod, reason=_reason(error))


def _pod(target: Any) -> str:
    return str(target.name) if target is not None and target.kind == "Pod" else ""


def _reason(error: Exception) -> str:
    if isinstance(error, client.ApiException):
        return f"{error.status} {error.reason}"
    return str(error) or type(error).__name__
