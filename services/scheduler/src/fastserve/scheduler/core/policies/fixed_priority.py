"""Fixed priority by input length, the paper's third baseline (FastServe, section 6.3)."""

from __future__ import annotations

from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.policies.base import Key, Promoting, class_rank


class FixedPriority(Promoting):
    """The shortest prompt first, whatever was generated since."""

    name = "fixed-priority"
    preemptive = True
    fair = True

    def key(self, job: Job) -> Key:
        return (not job.boosted, class_rank(job), job.spec.priority, job.prompt_len, job.place)

    def quanta(self) -> list[float]:
        return [0.0]
