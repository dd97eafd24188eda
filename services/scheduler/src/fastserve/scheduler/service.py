"""The process: a gRPC server, and one leadership after another with waiting in between."""

from __future__ import annotations

import asyncio
import gc
from functools import partial
from typing import Any

import grpc
import structlog
from grpc import aio
from prometheus_client import CollectorRegistry

from fastserve.common.errors import StartupError
from fastserve.common.lifecycle import announce_ready
from fastserve.common.rpc import GrpcServer
from fastserve.common.telemetry import serve_metrics
from fastserve.common.tls import load_tls
from fastserve.proto.v1 import scheduler_pb2, scheduler_pb2_grpc
from fastserve.scheduler import lease
from fastserve.scheduler.clock import Clock
from fastserve.scheduler.core import Scheduler
from fastserve.scheduler.leader import Leader, core_config
from fastserve.scheduler.lease import Term
from fastserve.scheduler.metrics import Metrics, NamesShard
from fastserve.scheduler.settings import SchedulerSettings
from fastserve.scheduler.store import Store
from fastserve.scheduler.store_errors import FencedError, StoreError
from fastserve.scheduler.surroundings import surroundings

log = structlog.get_logger(__name__)

_SERVER_GRACE_S = 1.0  # streams are ended before the server is stopped
# In the health service: SERVING once Redis answered, whether this process leads or stands by. The
# overall status says whether it leads, so it cannot tell Kubernetes that a standby is well.
ROLE_KNOWN = "role"


class Servicer(scheduler_pb2_grpc.SchedulerServiceServicer):
    """Hands calls to the leader; a standby refuses them with UNAVAILABLE."""

    def __init__(self) -> None:
        self.leader: Leader | None = None

    async def Serve(  # type: ignore[override]  # the stubs do not know writing to the context
        self, request_iterator: Any, context: aio.ServicerContext[Any, Any]
    ) -> None:
        leader = await self._leader(context)
        await leader.hub.serve(context)

    async def Snapshot(
        self, request: scheduler_pb2.SnapshotRequest, context: aio.ServicerContext[Any, Any]
    ) -> scheduler_pb2.SnapshotResponse:
        leader = await self._leader(context)
        return leader.snapshot(include_jobs=request.include_jobs)

    async def Drain(
        self,
        request: scheduler_pb2.DrainRequest,
        context: aio.ServicerContext[Any, Any],
    ) -> scheduler_pb2.DrainResponse:
        leader = await self._leader(context)
        engine = leader.engine
        try:
            jobs = engine.order_drain(request.worker_id, not request.undo)
        except KeyError:
            known = ", ".join(sorted(link.worker_id for link in engine.links)) or "none"
            text = f"no worker {request.worker_id!r} is connected (there are: {known})"
            await context.abort(grpc.StatusCode.NOT_FOUND, text)
        return scheduler_pb2.DrainResponse(jobs=jobs, others=engine.takers)

    async def _leader(self, context: aio.ServicerContext[Any, Any]) -> Leader:
        if self.leader is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "standby: another scheduler leads")
        assert self.leader is not None
        return self.leader


class Service:
    """One scheduler process without its metrics endpoint; tests start several in one process."""

    def __init__(self, settings: SchedulerSettings, clock: Clock | None = None) -> None:
        """Raises `StartupError` for settings that cannot work."""
        self.settings = settings
        self.registry = CollectorRegistry()
        self.address = self.health_address = ""
        self.answered = asyncio.Event()  # Redis did: the role of this process is known
        self._clock = clock or Clock()
        self._metrics = Metrics(self.registry)
        self._owner = lease.owner_name()
        self._servicer = Servicer()
        self._tls = load_tls(settings)
        self._server = GrpcServer()
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(
            self._servicer, self._server.server
        )
        try:
            Scheduler(core_config(settings))  # an unknown policy must show now
        except ValueError as error:
            raise StartupError(str(error)) from error
        self._store = Store(
            settings.redis_url,
            settings.shard,
            settings.redis_timeout,
            on_trouble=lambda trouble: self._metrics.redis_errors.labels(trouble).inc(),
        )

    @property
    def leader(self) -> Leader | None:
        """None while this process is a standby."""
        return self._servicer.leader

    async def start(self) -> None:
        """Listen. Raises `StartupError` if the address is taken."""
        self.address = await self._server.start(self.settings.listen, self._tls)
        await self._server.set_serving(False)
        await self._server.set_serving(False, (ROLE_KNOWN,))
        if self.settings.health_listen:
            self.health_address = await self._server.start_health(self.settings.health_listen)

    async def role_known(self) -> None:
        """Wait until this process leads or stands by, and show it in the health service."""
        await self.answered.wait()
        await self._server.set_serving(True, (ROLE_KNOWN,))

    async def run(self, stop: asyncio.Event) -> None:
        """Lead whenever nobody else does, until `stop`."""
        stopping = asyncio.ensure_future(stop.wait())
        try:
            while not stop.is_set():
                winning = asyncio.ensure_future(
                    lease.win(self._store, self._owner, self.settings.leader_ttl, self.answered.set)
                )
                await asyncio.wait({winning, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if winning.done():
                    await self._lead(winning.result(), stop)
                else:
                    winning.cancel()
        finally:
            stopping.cancel()
            await self._server.stop(_SERVER_GRACE_S)
            await self._store.close()

    async def _lead(self, term: Term, stop: asyncio.Event) -> None:
        try:
            async with surroundings(self.settings) as around:
                leader = Leader(
                    self.settings, self._store, term, self._clock, self._metrics, around, self._tls
                )
                await leader.restore()
                await leader.run(stop, partial(self._open, leader))
        except FencedError as error:
            log.warning("another scheduler leads: stepping down", reason=str(error))
        except StoreError as error:
            log.warning("redis failed before all jobs were read: trying again", reason=str(error))
        finally:
            self._servicer.leader = None
            self._metrics.step_down()
            await self._server.set_serving(False)
        try:
            await self._store.release(term.epoch)
        except StoreError as error:
            log.warning("lease not released: it will expire", reason=str(error))

    async def _open(self, leader: Leader) -> None:
        """Let gateways in."""
        self._servicer.leader = leader
        await self._server.set_serving(True)
        self._metrics.leader.set(1)


async def serve(settings: SchedulerSettings, stop: asyncio.Event) -> None:
    """The whole process, for `run_service`. Raises `StartupError`."""
    structlog.contextvars.bind_contextvars(shard=settings.shard)
    service = Service(settings)
    await service.start()
    shown = CollectorRegistry()
    shown.register(NamesShard(service.registry, settings.shard))
    try:
        metrics_port = serve_metrics(shown, settings.metrics_host, settings.metrics_port)
    except OSError as error:
        raise StartupError(f"metrics port {settings.metrics_port}: {error}") from error
    gc.collect()
    gc.freeze()  # what is here now stays: to walk it again would hold up plans

    async def announce() -> None:
        await service.role_known()
        announce_ready(
            settings,
            address=service.address,
            health_address=service.health_address,
            metrics_port=metrics_port,
        )

    async with asyncio.TaskGroup() as group:
        announcing = group.create_task(announce())
        await service.run(stop)
        announcing.cancel()
