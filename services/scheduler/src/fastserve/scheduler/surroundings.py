"""What a leader needs of the world around it: where workers are, and who hears of their cost."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from fastserve.common.errors import StartupError
from fastserve.scheduler.discovery import Discovery, Dns, Static
from fastserve.scheduler.settings import SchedulerSettings


class Costs(Protocol):
    """Hears from time to time what it would cost to delete pods."""

    async def update(self, costs: Mapping[str, int], now: float) -> None: ...


@dataclass(frozen=True)
class Surroundings:
    """`costs` None: nobody wants to know."""

    discovery: Discovery
    costs: Costs | None = None


@contextlib.asynccontextmanager
async def surroundings(settings: SchedulerSettings) -> AsyncIterator[Surroundings]:
    """As configured. Raises `StartupError` if Kubernetes cannot be used from here."""
    match settings.discovery:
        case "static":
            yield Surroundings(Static(settings.workers))
        case "dns":
            yield Surroundings(Dns(settings.workers, settings.discovery_interval))
        case "kubernetes":
            try:  # not everybody has the client installed
                from fastserve.scheduler import kube
            except ModuleNotFoundError as error:
                raise StartupError(
                    "--discovery kubernetes needs the package kubernetes "
                    "(pip install fastserve-scheduler[kubernetes])"
                ) from error
            namespace = settings.kubernetes_namespace or kube.own_namespace()
            async with kube.connect() as api:
                yield Surroundings(
                    kube.EndpointSlices(
                        api, settings.kubernetes_service, namespace, settings.kubernetes_port
                    ),
                    kube.DeletionCosts(api, namespace),
                )
