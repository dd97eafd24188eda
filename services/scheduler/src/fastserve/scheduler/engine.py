"""The one owner of the core: everything that happens goes through here, one thing at a time.

    gateway ──submit, cancel──▶ ┌────────┐ ──plan──▶ worker
    worker  ──report──────────▶ │ engine │
    time    ──tick────────────▶ └────────┘ ──marks──▶ journal ──visible──▶ gateway

After a report the next plan leaves first: the worker never waits for Redis. The tokens of the
report are marked for the journal, which makes them visible once they are written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from fastserve.proto.v1 import scheduler_pb2, worker_pb2
from fastserve.scheduler import gateway_wire, wire
from fastserve.scheduler.clock import Clock
from fastserve.scheduler.core import (
    Event,
    EventKind,
    FinishReason,
    Inventory,
    Progress,
    ProtocolError,
    Rejection,
    RejectReason,
    Scheduler,
    WorkerInfo,
)
from fastserve.scheduler.durability import Journal
from fastserve.scheduler.jobs import End, JobRecord, JobTable, TokenLogprobs
from fastserve.scheduler.metrics import Metrics
from fastserve.scheduler.tracing import JobTraces
from fastserve.scheduler.worker_link import WorkerLink

log = structlog.get_logger(__name__)

_TICK_S: Final = 0.05
_PATIENCE: Final = 10.0  # an iteration may take so many times what was expected of it
# What changes the place or the state that Redis holds.
_MOVES: Final = frozenset(
    {EventKind.STARTED, EventKind.PREEMPTED, EventKind.DEMOTED, EventKind.PROMOTED}
)


class Engine:
    """Turns what happens into core calls, plans and marks. Methods are synchronous."""

    def __init__(
        self,
        core: Scheduler,
        jobs: JobTable,
        journal: Journal,
        clock: Clock,
        metrics: Metrics,
        traces: JobTraces,
        *,
        epoch: int,
        worker_timeout: float,
        workers_changed: Callable[[], None],
    ) -> None:
        self._core = core
        self._jobs = jobs
        self._journal = journal
        self._clock = clock
        self._metrics = metrics
        self._traces = traces
        self._epoch = epoch
        self._worker_timeout = worker_timeout
        self._workers_changed = workers_changed
        self._links: dict[str, WorkerLink] = {}  # connected, by worker id
        self._changed = asyncio.Event()
        self.draining = False
        self.ticks = 0  # of `tick`

    @property
    def links(self) -> list[WorkerLink]:
        """Connected workers."""
        return list(self._links.values())

    # From gateways

    def submit(self, submit: scheduler_pb2.Submit) -> JobRecord | Rejection:
        self._metrics.incoming.inc()
        result = self._admit(submit)
        if isinstance(result, Rejection):
            outcome = f"rejected_{result.reason.name.lower()}"
            self._metrics.requests.labels(outcome).inc()
            return result
        self._jobs.add(result)
        self._journal.mark(result)
        self._traces.begin(result, result.spec.arrival)
        self._changed.set()
        return result

    def _admit(self, submit: scheduler_pb2.Submit) -> JobRecord | Rejection:
        if self.draining:
            return Rejection(RejectReason.DRAINING, "the scheduler is stopping", 1)
        if submit.job_id in self._jobs:
            return Rejection(RejectReason.ALREADY_EXISTS, f"job {submit.job_id} exists", 0)
        spec = gateway_wire.spec_of(submit, self._clock)
        if isinstance(spec, Rejection):
            return spec
        rejection = self._core.submit(spec, spec.arrival)
        if rejection is not None:
            return rejection
        job = self._core.job(spec.job_id)
        assert job is not None
        return JobRecord(
            spec=spec,
            output=job.output,
            job=job,
            sampling=submit.sampling,
            traceparent=submit.traceparent,
            arrival_unix_s=self._clock.to_unix(spec.arrival),
            deadline_unix_s=submit.deadline_unix_s,
        )

    def cancel(self, record: JobRecord) -> None:
        now = self._clock.now()
        if record.end is None and self._core.cancel(record.job_id, now):
            self._end(record, FinishReason.CANCELLED, "", now)
            self._changed.set()

    # From workers

    def codec(self) -> wire.StreamCodec:
        return wire.StreamCodec(self._epoch, self._jobs.get, self._core.config.prefix_cache)

    def worker_up(self, link: WorkerLink, info: WorkerInfo, inventory: Inventory) -> None:
        """Raises `ProtocolError` if it clashes with a worker that is connected already."""
        described = link.described
        assert described is not None
        if info.worker_id in self._links:
            other = self._links[info.worker_id].address
            raise ProtocolError(f"worker id {info.worker_id} is connected from {other}")
        for other_link in self._links.values():
            model = other_link.described.model if other_link.described else ""
            if model != described.model:
                raise ProtocolError(f"serves {described.model}, the others {model}")
        now = self._clock.now()
        unknown = self._core.add_worker(info, inventory, now, draining=described.draining)
        if unknown:
            log.info("worker holds jobs that are over", worker=info.worker_id, jobs=len(unknown))
        self._links[info.worker_id] = link
        self._note(link, connected=True)
        self._workers_changed()
        self._changed.set()

    def worker_down(self, link: WorkerLink) -> None:
        del self._links[link.worker_id]
        self._core.remove_worker(link.worker_id, self._clock.now())
        self._note(link, connected=False)
        self._workers_changed()
        self._changed.set()

    def _note(self, link: WorkerLink, *, connected: bool) -> None:
        described = link.described
        assert described is not None
        facts: dict[str, str | float] = {
            "address": link.address,
            "model": described.model,
            "epoch": described.epoch,
            "connected": connected,
            "changed_unix_s": round(self._clock.unix(), 3),
        }
        self._journal.note_worker(described.worker_id, facts)

    def report(self, link: WorkerLink, report: worker_pb2.IterationReport) -> None:
        assert link.stream is not None
        now = self._clock.now()
        decoded = link.stream.decode(report)
        self._follow_drain(link, report.draining, now)
        if report.HasField("place"):
            self._core.take_kv_at(link.worker_id, wire.place_of(report.place))
        progress = self._core.on_report(link.worker_id, decoded, now)
        self._plan(link, now)
        self._absorb(progress, wire.logprobs_of(report), now)
        if report.iteration and report.row_new_tokens:
            phase = wire.phase_of(report.row_new_tokens)
            self._metrics.iteration.labels(phase).observe(report.seconds)
        if decoded.stalled:
            log.error("worker had no block for rows", worker=link.worker_id, jobs=decoded.stalled)
        self._settle()

    def _follow_drain(self, link: WorkerLink, draining: bool, now: float) -> None:
        """The worker says that it is to leave, or no more; unless it has yet to hear an order."""
        if link.drain_order is not None:
            if draining is not link.drain_order:
                return
            link.drain_order = None
        if draining is not self._core.draining(link.worker_id):
            self._drain(link, draining, now)

    def _drain(self, link: WorkerLink, draining: bool, now: float) -> None:
        jobs, running = self._core.jobs_of(link.worker_id)
        log.info(
            "worker drains" if draining else "worker takes jobs again",
            worker=link.worker_id,
            jobs=jobs,
            running=running,
            others=self.takers,
        )
        self._core.drain(link.worker_id, draining, now)
        self._workers_changed()
        self._changed.set()

    @property
    def takers(self) -> int:
        """Connected workers that take new jobs."""
        return sum(not self._core.draining(worker_id) for worker_id in self._links)

    def order_drain(self, worker_id: str, draining: bool) -> int:
        """An operator wants a worker drained, or no more; jobs that it still has.

        The worker notes it, so that the next leader knows. Raises KeyError if it is not connected.
        """
        link = self._links[worker_id]
        link.drain_order = draining
        self._drain(link, draining, self._clock.now())
        return self._core.jobs_of(worker_id)[0]

    def _absorb(self, progress: Progress, logprobs: dict[int, TokenLogprobs], now: float) -> None:
        for job_id, index, _, position in progress.tokens:
            record = self._jobs.get(job_id)
            assert record is not None
            if position in logprobs:
                record.logprobs[index] = logprobs[position]
            if index == 0:
                self._traces.first_token(job_id, now)
            self._journal.mark(record)
        for finished in progress.finished:
            self._end_job(finished.job_id, finished.reason, finished.error, now)

    # From time

    async def run(self) -> None:
        """Plan after submissions, cancellations and changes of workers, until cancelled.

        What arrives in one turn of the event loop is planned together.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            now = self._clock.now()
            for link in self._links.values():
                self._plan(link, now)
            self._settle()

    async def tick(self) -> None:
        """Deadlines, graces, and whatever the core does as time goes by, until cancelled."""
        before = self._clock.now()
        while True:
            await asyncio.sleep(_TICK_S)
            self.ticks += 1
            now = self._clock.now()
            self._forgive(now - before - 2 * _TICK_S)
            before = now
            for finished in self._core.expire(now):
                self._end_job(finished.job_id, finished.reason, finished.error, now)
            for record in self._jobs.abandoned(now):
                log.info("no gateway came for the job: cancelled", job=record.job_id)
                self.cancel(record)
            self._jobs.forget_ended(now)
            self._core.balance(now)
            self._cut_silent(now)
            self._changed.set()

    def _forgive(self, stood_s: float) -> None:
        """This process stood still for a while: what workers said meanwhile is not read yet."""
        for link in self._links.values():
            link.last_heard += max(0.0, stood_s)

    def _cut_silent(self, now: float) -> None:
        """A worker that hangs keeps its connection: end it, so that its jobs go elsewhere."""
        for link in self._links.values():
            patience_s = self._core.patience_s(link.worker_id)
            if patience_s is None:
                link.last_heard = now  # it owes nothing
                continue
            silent = now - link.last_heard
            if silent > self._worker_timeout + _PATIENCE * patience_s:
                link.cut("silent", f"{link.worker_id} has work and said nothing for {silent:.1f} s")

    # Consequences

    def _plan(self, link: WorkerLink, now: float) -> None:
        started = self._clock.now()
        plan = self._core.plan(link.worker_id, now)
        if plan is not None:
            link.send(plan)
            self._metrics.plan.observe(self._clock.now() - started)

    def _end_job(self, job_id: str, reason: FinishReason, error: str, now: float) -> None:
        record = self._jobs.get(job_id)
        assert record is not None
        self._end(record, reason, error, now)

    def _end(self, record: JobRecord, reason: FinishReason, error: str, now: float) -> None:
        record.end = End(reason, error)
        self._jobs.retire(record, now)
        self._journal.mark(record)
        self._traces.finish(record, now)
        self._metrics.requests.labels(reason.lower()).inc()
        assert record.job is not None
        self._metrics.request_preemptions.observe(record.job.preemptions)
        if record.preempted_at is not None:
            record.preempted_s += now - record.preempted_at
        self._metrics.time_preempted.observe(record.preempted_s)
        if reason is FinishReason.FAILED:
            log.error("job failed", job=record.job_id, reason=error)

    def _settle(self) -> None:
        """Follow the core's events, then let the marks go out together."""
        for event in self._core.drain_events():
            record = self._jobs.get(event.job_id)
            if record is not None:
                self._follow(record, event)
        self._journal.commit()

    def _follow(self, record: JobRecord, event: Event) -> None:
        kind = event.kind
        self._traces.event(event)
        if kind in _MOVES:
            self._journal.mark(record, placed=True)
        if kind is EventKind.PREEMPTED:
            record.preempted_at = event.now
        elif kind is EventKind.STARTED and record.preempted_at is not None:
            record.preempted_s += event.now - record.preempted_at
            record.preempted_at = None
