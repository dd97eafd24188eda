"""The scheduler: jobs in, plans out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.types import (
    Event,
    Finished,
    Inventory,
    JobSpec,
    Plan,
    Progress,
    Rejection,
    Report,
    SchedulerConfig,
    WorkerInfo,
)


class Scheduler:
    """Decides which jobs run and where their KV cache lies, for any number of worker groups."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.counters: Counter[str] = Counter()

    def add_worker(self, info: WorkerInfo, inventory: Inventory, now: float) -> list[str]:
        raise NotImplementedError

    def remove_worker(self, worker_id: str, now: float) -> None:
        raise NotImplementedError

    def submit(self, spec: JobSpec, now: float) -> Rejection | None:
        raise NotImplementedError

    def restore(
        self,
        spec: JobSpec,
        output: Sequence[int],
        *,
        level: int,
        attained: float,
        preemptions: int,
        now: float,
    ) -> None:
        raise NotImplementedError

    def cancel(self, job_id: str, now: float) -> bool:
        raise NotImplementedError

    def expire(self, now: float) -> list[Finished]:
        raise NotImplementedError

    def on_report(self, worker_id: str, report: Report, now: float) -> Progress:
        raise NotImplementedError

    def plan(self, worker_id: str, now: float) -> Plan | None:
        raise NotImplementedError

    def job(self, job_id: str) -> Job | None:
        raise NotImplementedError

    def jobs(self) -> Iterable[Job]:
        raise NotImplementedError

    def level_depths(self) -> list[int]:
        raise NotImplementedError

    def level_quanta(self) -> list[float]:
        raise NotImplementedError

    def drain_events(self) -> list[Event]:
        raise NotImplementedError

    def check_integrity(self) -> None:
        raise NotImplementedError
