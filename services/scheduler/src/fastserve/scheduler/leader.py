"""One time of leadership: everything that exists only while this process leads the shard."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from opentelemetry import trace

from fastserve.common.tls import Tls
from fastserve.proto.v1 import scheduler_pb2
from fastserve.scheduler import lease
from fastserve.scheduler.clock import Clock
from fastserve.scheduler.core import (
    Demotion,
    FinishReason,
    JobSpec,
    JobState,
    KvStrategy,
    PrefixCache,
    Scheduler,
    SchedulerConfig,
)
from fastserve.scheduler.durability import Journal
from fastserve.scheduler.engine import Engine
from fastserve.scheduler.gateway_hub import GatewayHub
from fastserve.scheduler.jobs import End, JobRecord, JobTable
from fastserve.scheduler.lease import Term
from fastserve.scheduler.links import Links
from fastserve.scheduler.metrics import Metrics
from fastserve.scheduler.settings import SchedulerSettings
from fastserve.scheduler.slow import Slowness
from fastserve.scheduler.snapshot import snapshot
from fastserve.scheduler.store import Store
from fastserve.scheduler.store_errors import FencedError
from fastserve.scheduler.stored import StoredJob
from fastserve.scheduler.surroundings import Surroundings
from fastserve.scheduler.tracing import JobTraces
from fastserve.scheduler.worker_link import WorkerLink

log = structlog.get_logger(__name__)

_GAUGES_S: Final = 0.5
_PRICE_S: Final = 1.0
_FIRST_WORKER_S: Final = 0.5
_POLL_S: Final = 0.005


class Leader:
    """Rebuilds the state from Redis, serves, and leaves it all in Redis when it stops."""

    def __init__(
        self,
        settings: SchedulerSettings,
        store: Store,
        term: Term,
        clock: Clock,
        metrics: Metrics,
        around: Surroundings,
        tls: Tls | None = None,
    ) -> None:
        self._settings = settings
        self._store = store
        self._term = term
        self._clock = clock
        self._metrics = metrics
        self._started = clock.now()
        self.core = Scheduler(core_config(settings))
        self.jobs = JobTable(settings.grace)
        self.journal = Journal(
            store,
            term,
            self.jobs,
            clock,
            keep_s=max(1, round(settings.grace)),
            changed=self._durability_changed,
            observe=metrics.redis_write.observe,
        )
        self._traces = JobTraces(trace.get_tracer("fastserve.scheduler"), clock)
        self.engine = Engine(
            self.core,
            self.jobs,
            self.journal,
            clock,
            metrics,
            self._traces,
            epoch=term.epoch,
            worker_timeout=settings.worker_timeout,
            workers_changed=self._workers_changed,
        )
        self.hub = GatewayHub(self.engine, self.jobs, clock, settings.shard, term.epoch)
        self._costs = around.costs
        self.links = Links(
            around.discovery,
            lambda endpoint: WorkerLink(
                endpoint, settings.shard, term.epoch, self.engine, clock, metrics, tls
            ),
        )

    async def restore(self) -> None:
        """Take over the jobs that Redis holds. Raises `StoreError`s."""
        gc.disable()  # all that is made now stays: to look for garbage only costs time
        try:
            await self._restore_all()
        finally:
            gc.enable()

    async def _restore_all(self) -> None:
        renewal = asyncio.ensure_future(lease.keep(self._store, self._term, self.journal))
        try:
            stored = await self._store.load()
            if await self._store.evicts():
                log.warning("redis may evict jobs", advice="set its maxmemory-policy to noeviction")
        finally:
            renewal.cancel()
            # Fenced already: the first write will tell.
            await asyncio.gather(renewal, return_exceptions=True)
        now = self._clock.now()
        for job in stored:
            self._restore(job, now)
        if stored:
            live = sum(1 for _ in self.jobs.live())
            log.info("jobs restored", live=live, ended=len(stored) - live)

    def _restore(self, stored: StoredJob, now: float) -> None:
        deadline = stored.deadline_unix_s
        spec = JobSpec(
            job_id=stored.job_id,
            prompt=tuple(stored.prompt),
            max_tokens=stored.sampling.max_tokens,
            arrival=self._clock.from_unix(stored.arrival_unix_s),
            tenant=stored.tenant,
            tenant_weight=stored.tenant_weight,
            service_class=stored.service_class,
            priority=stored.priority,
            deadline=self._clock.from_unix(deadline) if deadline else None,
            min_tokens=stored.min_output_tokens,
        )
        job = None
        if not stored.finish_reason:
            self.core.restore(
                spec,
                stored.output,
                level=stored.level,
                attained=stored.attained_s,
                preemptions=stored.preemptions,
                now=now,
            )
            job = self.core.job(spec.job_id)
        record = JobRecord(
            spec=spec,
            output=stored.output if job is None else job.output,
            job=job,
            sampling=stored.sampling,
            traceparent=stored.traceparent,
            arrival_unix_s=stored.arrival_unix_s,
            deadline_unix_s=deadline,
            written=len(stored.output),
            visible=len(stored.output),
        )
        self.jobs.add(record)
        if job is None:
            record.end = End(FinishReason(stored.finish_reason), stored.error)
            record.end_visible = True
            self.jobs.retire(record, now)
        else:
            self.jobs.orphan(record, now)
            self._traces.begin(record, now, restored=True)
            self.journal.mark(record, placed=True)  # places are counted anew

    async def run(self, stop: asyncio.Event, opened: Callable[[], Awaitable[None]]) -> None:
        """Serve until `stop`. Raises `FencedError` when another leader took over.

        `opened` is called when gateways are welcome: when there is a worker, or soon.
        """
        self._durability_changed(True)
        fenced: FencedError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                writing = group.create_task(self.journal.run())
                others = [
                    group.create_task(lease.keep(self._store, self._term, self.journal)),
                    group.create_task(self.engine.run()),
                    group.create_task(self.engine.tick()),
                    group.create_task(self.hub.watch()),
                    group.create_task(self._gauge()),
                    group.create_task(self._price()),
                ]
                linking = group.create_task(self.links.run())
                await self._first_worker(stop)
                await opened()
                await stop.wait()
                await self._resign(linking)
                for task in [writing, *others]:
                    task.cancel()
        except* FencedError as group_error:
            cause: BaseException = group_error
            while isinstance(cause, BaseExceptionGroup):
                cause = cause.exceptions[0]
            fenced = FencedError(str(cause))
        finally:
            self.hub.close()
            self._traces.close(self._clock.now())
        if fenced is not None:
            raise fenced

    async def _first_worker(self, stop: asyncio.Event) -> None:
        """Jobs that came before it would be refused."""
        deadline = self._clock.now() + _FIRST_WORKER_S
        while not (self.engine.links or stop.is_set()):  # once, at the start
            if self._clock.now() > deadline:
                return
            await asyncio.sleep(_POLL_S)

    async def _resign(self, linking: asyncio.Task[None]) -> None:
        """Jobs are not waited for: they go on under the next leader from what is written."""
        self.engine.draining = True
        linking.cancel()
        await asyncio.wait({linking})
        try:
            async with asyncio.timeout(self._settings.shutdown_timeout):
                await self.journal.flush()
        except TimeoutError:
            log.error("redis is away: what was not written is lost", jobs=len(self.jobs))

    async def _price(self) -> None:
        """Tell what deleting the pods of workers would cost, until cancelled."""
        while self._costs is not None:
            await asyncio.sleep(_PRICE_S)
            pods = {link.pod: link.worker_id for link in self.engine.links if link.pod}
            costs = {pod: self.core.moving_cost(worker) for pod, worker in pods.items()}
            await self._costs.update(costs, self._clock.now())

    async def _gauge(self) -> None:
        """Set the gauges and tell gateways the load from time to time, until cancelled."""
        self._metrics.restart()
        slowness = Slowness()
        while True:
            jobs = list(self.core.jobs())
            running = sum(job.state is JobState.RUNNING for job in jobs)
            self._metrics.follow(self.core.counters)
            self._metrics.follow_waits(self.core.kv_wait())
            self._metrics.set_depths(self.hub.model, self.core.level_depths(), running)
            self._metrics.redis_backlog.set(self.journal.backlog)
            self._metrics.workers.set(len(self.engine.links))
            workers = [link.worker_id for link in self.engine.links]
            models = {worker: self.core.cost_model(worker) for worker in workers}
            self._metrics.set_costs(
                models, {worker: self.core.queued_work_s(worker) for worker in workers}
            )
            self._metrics.set_groups(
                {worker: self.core.jobs_of(worker)[0] for worker in workers},
                len(workers) - self.engine.takers,
                slowness.compare(models),
            )
            self._metrics.gateways.set(self.hub.sessions)
            self.hub.announce(always=True, live_jobs=len(jobs))
            await asyncio.sleep(_GAUGES_S)

    def _workers_changed(self) -> None:
        """Model and limits stay as they were while no worker is connected."""
        workers = [
            link.described
            for link in self.engine.links
            if link.described is not None and not self.core.draining(link.worker_id)
        ]
        if not workers:
            self.hub.announce(ready=False)
            return
        rows = self._settings.max_num_seqs
        self.hub.announce(
            ready=True,
            model=workers[0].model,
            max_num_seqs=sum(
                min(rows or worker.max_num_seqs, worker.max_num_seqs) for worker in workers
            ),
            max_model_len=max(worker.max_model_len for worker in workers),
            max_job_tokens=max(
                min(worker.max_model_len, worker.device_blocks * worker.block_size)
                for worker in workers
            ),
        )

    def _durability_changed(self, durable: bool) -> None:
        self._metrics.durable.set(durable)
        self.hub.announce(durable=durable)

    def snapshot(self, *, include_jobs: bool) -> scheduler_pb2.SnapshotResponse:
        return snapshot(
            self.core,
            self.links,
            shard=self._settings.shard,
            epoch=self._term.epoch,
            durable=self.journal.durable,
            uptime_s=self._clock.now() - self._started,
            now=self._clock.now(),
            include_jobs=include_jobs,
        )


def core_config(settings: SchedulerSettings) -> SchedulerConfig:
    return SchedulerConfig(
        policy=settings.policy,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_queued_jobs=settings.max_num_queued_reqs,
        lease=settings.lease,
        max_partial_prefills=settings.max_num_partial_prefills,
        look_ahead=settings.look_ahead,
        fair_sharing=settings.fair_sharing,
        quantum_s=settings.quantum,
        quantum_ratio=settings.quantum_ratio,
        levels=settings.levels,
        demotion=Demotion(settings.demotion),
        starvation_s=settings.starvation_threshold,
        promotion_share=settings.promotion_share,
        prefix_cache=PrefixCache(settings.prefix_cache),
        kv_strategy=KvStrategy(settings.kv_strategy),
        kv_reserve_blocks=settings.kv_reserve_blocks,
        kv_write_through=settings.kv_write_through,
    )
