"""Discrete events around the scheduler core: the real core, workers that only take time.

A worker does what plans say: an iteration lasts as long as the hardware's formula says, copies
go through one channel per direction beside it. Reports and plans travel in no time, so a plan takes
effect at the next iteration; of a real deployment only the network and the lease are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fastserve.bench.sim.types import SimJob, SimOptions, SimResult
from fastserve.bench.sim.worker import SimWorker
from fastserve.scheduler.core import (
    CostSample,
    Inventory,
    Job,
    JobSpec,
    KvStrategy,
    Progress,
    Report,
    Scheduler,
    SchedulerConfig,
    WorkerInfo,
)

_UNLIMITED = 1 << 40  # tokens
_BALANCE_S = 0.05  # as often as the service
_EVERY = 256  # ended jobs between two calls of `progress`


class StuckError(Exception):
    """Jobs are left, but nothing will ever happen: a bug of the scheduler."""


def simulate(
    jobs: Sequence[SimJob],
    options: SimOptions,
    progress: Callable[[int], None] | None = None,
) -> SimResult:
    """Run all jobs, given by arrival, to their end. `progress` gets the number ended so far.

    Raises ValueError for options that make no sense, `StuckError`.
    """
    return _Simulation(jobs, options, progress).run()


class _Simulation:
    def __init__(
        self,
        jobs: Sequence[SimJob],
        options: SimOptions,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._jobs = jobs
        self._progress = progress
        self._core = Scheduler(
            SchedulerConfig(
                policy=options.policy,
                max_queued_jobs=max(len(jobs), 1),
                lease=options.lease,
                kv_strategy=KvStrategy(options.kv_strategy),
                **options.scheduler,
            )
        )
        self._workers: dict[str, SimWorker] = {}
        for at, speed in enumerate(options.speeds):
            info = _info(options, f"sim-{at}", speed)
            self._core.add_worker(info, Inventory(), 0.0)
            self._workers[info.worker_id] = SimWorker(options, info, speed)
        self._busy: dict[str, tuple[float, Report]] = {}  # iterations under way: end, report
        self._balanced = 0.0
        self._first = np.full(len(jobs), np.nan)
        self._end = np.full(len(jobs), np.nan)
        self._service = np.zeros(len(jobs))
        self._served = np.zeros(len(jobs))
        self._live: dict[str, Job] = {}
        self._next = 0  # job to arrive
        self._left = 0  # jobs that arrived and have not ended
        self._failed = 0

    def run(self) -> SimResult:
        jobs, core, workers = self._jobs, self._core, self._workers
        now = jobs[0].arrival_s if jobs else 0.0
        reported = 0
        while self._next < len(jobs) or self._left:
            self._arrive(now)
            if len(workers) > 1 and now >= self._balanced + _BALANCE_S:
                self._balanced = now
                core.balance(now)
            self._begin(now)
            now = self._next_event()
            if now == float("inf"):
                raise StuckError(f"{self._left} jobs are left and nothing happens")
            for name, worker in workers.items():
                report = self._report(name, worker, now)
                if report is not None:
                    self._note(worker, core.on_report(name, report, now), now)
            core.drain_events()
            ended = self._next - self._left
            if self._progress is not None and ended - reported >= _EVERY:
                reported = ended
                self._progress(ended)
        if self._progress is not None:
            self._progress(len(jobs))
        return self._result()

    def _begin(self, now: float) -> None:
        """Workers at a boundary get their plans and begin an iteration, if there is one."""
        for name, worker in self._workers.items():
            if name in self._busy:
                continue
            plan = self._core.plan(name, now)
            if plan is not None:
                worker.receive(plan, now)
            if worker.runnable:
                self._busy[name] = worker.iterate(now)

    def _next_event(self) -> float:
        """When an iteration ends; while a worker is idle also when a copy ends or a job comes."""
        moment = min((end for end, _ in self._busy.values()), default=float("inf"))
        for name, worker in self._workers.items():
            if name not in self._busy:
                moment = min(moment, worker.copied_at, self._next_arrival())
        return moment

    def _report(self, name: str, worker: SimWorker, now: float) -> Report | None:
        if name not in self._busy:
            return worker.copied(now)
        if self._busy[name][0] > now:
            return None
        return self._busy.pop(name)[1]

    def _next_arrival(self) -> float:
        return self._jobs[self._next].arrival_s if self._next < len(self._jobs) else float("inf")

    def _arrive(self, now: float) -> None:
        while self._next < len(self._jobs) and self._jobs[self._next].arrival_s <= now:
            index, job = self._next, self._jobs[self._next]
            self._next += 1
            spec = JobSpec(
                job_id=str(index),
                prompt=range(job.prompt_tokens),
                max_tokens=job.output_tokens,
                arrival=job.arrival_s,
                tenant=job.tenant,
                service_class=job.service_class,
            )
            if self._core.submit(spec, now) is None:
                live = self._core.job(spec.job_id)
                assert live is not None
                self._live[spec.job_id] = live
                self._left += 1
            else:
                self._failed += 1
            if self._next == len(self._jobs):
                self._take_stock()

    def _take_stock(self) -> None:
        """Note what every job had of the worker so far."""
        self._served[:] = self._service  # of those that ended
        for job_id, job in self._live.items():
            self._served[int(job_id)] = job.attained

    def _note(self, worker: SimWorker, progress: Progress, now: float) -> None:
        for job_id, index, _, _ in progress.tokens:
            if not index:
                self._first[int(job_id)] = now
        for ended in progress.finished:
            self._left -= 1
            worker.forget(ended.job_id)
            self._service[int(ended.job_id)] = self._live.pop(ended.job_id).attained
            if ended.error:
                self._failed += 1
            else:
                self._end[int(ended.job_id)] = now

    def _result(self) -> SimResult:
        jobs, counters = self._jobs, self._core.counters
        preemptions = sum(n for name, n in counters.items() if name.startswith("preemptions."))
        done = self._end[~np.isnan(self._end)]
        kv_wait_s, row_s = self._core.kv_wait()
        return SimResult(
            arrival_s=np.array([job.arrival_s for job in jobs]),
            prompt_tokens=np.array([job.prompt_tokens for job in jobs], dtype=np.int64),
            output_tokens=np.array([job.output_tokens for job in jobs], dtype=np.int64),
            first_token_s=np.where(np.isnan(self._end), np.nan, self._first),
            end_s=self._end,
            service_s=self._service,
            served_s=self._served,
            tenants=[job.tenant for job in jobs],
            preemptions=preemptions,
            offloaded_tokens=counters["tokens.offload"] + counters["tokens.copy_out"],
            uploaded_tokens=counters["tokens.upload"],
            recomputed_tokens=counters["tokens.recomputed"],
            kv_wait_s=kv_wait_s,
            row_s=row_s,
            migrations=sum(n for name, n in counters.items() if name.startswith("migrations.")),
            failed=self._failed,
            makespan_s=float(done.max() - jobs[0].arrival_s) if done.size else 0.0,
        )


def _info(options: SimOptions, name: str, speed: float) -> WorkerInfo:
    """What the worker says of itself; its two measurements come from the formula."""
    hardware, chunk = options.hardware, min(512, options.max_num_batched_tokens)
    prefill_s = hardware.iteration_s([(0, chunk)], 0, 0) / speed
    decode_s = hardware.iteration_s([], 1, 256) / speed
    kv_tokens = _UNLIMITED if options.kv_tokens is None else options.kv_tokens
    return WorkerInfo(
        worker_id=name,
        block_size=options.block_size,
        device_blocks=kv_tokens // options.block_size,
        host_blocks=options.host_kv_tokens // options.block_size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=_UNLIMITED,
        prefill_sample=CostSample(1, chunk, chunk, prefill_s),
        decode_sample=CostSample(1, 1, 256, decode_s),
    )
