"""Highest response ratio next: shortest first with aging, without preemption."""

from __future__ import annotations

from typing import Any

from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.policies.base import Key, Policy
from fastserve.scheduler.core.types import JobState


class Hrrn(Policy):
    """The largest (wait + service) / service first, service being the predicted prefill.

    Output lengths are unknown, so the prompt stands for the job, as in SGLang's policy of this
    name. Neither class nor priority counts. Ratios grow at different paces: the queue is sorted
    anew from time to time.
    """

    name = "hrrn"
    preemptive = False
    resort_s = 0.1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._now = 0.0

    def key(self, job: Job) -> Key:
        running = job.state is JobState.RUNNING
        wait = max(self._now - job.spec.arrival, 0.0)
        ratio = 0.0 if running else wait / job.limit
        return (not running, -ratio, job.seq)

    def quanta(self) -> list[float]:
        return [0.0]

    def admit(self, job: Job) -> None:
        job.limit = max(self.cost.prefill(job.known_len, self.budget), 1e-6)

    def resort(self, now: float) -> bool:
        if now - self._now < self.resort_s:
            return False
        self._now = now
        return True
