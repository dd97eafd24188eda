"""First come, first served: run to completion, with continuous batching."""

from __future__ import annotations

from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.policies.base import Key, Policy
from fastserve.scheduler.core.types import JobState


class Fcfs(Policy):
    """By arrival, whatever class or priority. A job keeps its row to its end; only if memory runs
    out, the newest stops."""

    name = "fcfs"
    preemptive = False

    def key(self, job: Job) -> Key:
        return (job.state is not JobState.RUNNING, job.seq)

    def quanta(self) -> list[float]:
        return [0.0]
