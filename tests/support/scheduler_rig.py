"""A scheduler and one worker model, driven step by step."""

from __future__ import annotations

from typing import Any

from fastserve.scheduler.core import (
    Inventory,
    Job,
    JobSpec,
    KvOpKind,
    Plan,
    Progress,
    Rejection,
    Scheduler,
    SchedulerConfig,
)
from support.worker_model import WorkerModel, worker_info


class Rig:
    """`now` moves on by 10 ms per iteration. Copies end at once unless `slow_copies`."""

    def __init__(self, config: dict[str, Any] | None = None, **worker: int) -> None:
        self.now = 0.0
        self.scheduler = Scheduler(SchedulerConfig(**{"starvation_s": 1e6, **(config or {})}))
        self.lengths: dict[str, int] = {}
        self.cached: dict[str, int] = {}
        self.info = worker_info("w", **worker)
        self.worker = WorkerModel(self.info, self.lengths, self.scheduler.job, self.cached)
        self.scheduler.add_worker(self.info, Inventory(), 0.0)
        self.ops: list[tuple[KvOpKind, str]] = []  # of all plans so far
        self.slow_copies = False

    def submit(
        self, job_id: str, prompt: int = 4, max_tokens: int = 8, **spec: Any
    ) -> Rejection | None:
        self.lengths[job_id] = spec.pop("length", max_tokens)
        self.cached[job_id] = spec.pop("cached", 0)
        return self.scheduler.submit(
            JobSpec(job_id, tuple(range(prompt)), max_tokens, self.now, **spec), self.now
        )

    def job(self, job_id: str) -> Job:
        job = self.scheduler.job(job_id)
        assert job is not None, f"{job_id} has ended"
        return job

    def plan(self) -> Plan | None:
        """Ask for a plan and give it to the worker."""
        plan = self.scheduler.plan(self.info.worker_id, self.now)
        if plan is not None:
            self.ops += [(op.kind, op.job_id) for op in plan.ops]
            self.worker.receive(plan)
        return plan

    def rows(self) -> list[tuple[str, int]]:
        """Rows of the newest plan, which is asked for."""
        plan = self.plan()
        assert plan is not None, "nothing new"
        return [(row.job.job_id, row.tokens) for row in plan.rows]

    def step(self) -> Progress | None:
        """One iteration and its report."""
        report = self.worker.step()
        self.now += 0.010
        if report is None:
            return None
        progress = self.scheduler.on_report(self.info.worker_id, report, self.now)
        self.scheduler.check_integrity()
        return progress

    def run(self, iterations: int = 1) -> list[str]:
        """Plan and iterate; ids of the jobs that ended, in order."""
        ended = []
        for _ in range(iterations):
            self.plan()
            self.worker.apply_all()
            if not self.slow_copies:
                self.worker.finish_copies()
            progress = self.step()
            if progress is not None:
                ended += [finished.job_id for finished in progress.finished]
        return ended
