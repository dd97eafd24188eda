"""Multi-level feedback queues: naive, and with skip-join (FastServe paper, section 4).

Level k has a quantum of q1 * ratio^k seconds, q1 being the measured time of a decode iteration. A
job that used its quantum up goes to the back of a lower level. Where paper and artifact differ,
this is what is done here:
- q1 follows the measurement, it is not a constant (option `quantum_s`);
- a job sinks as many levels as its use calls for, and what it used beyond the quanta on the way
  counts in the level where it lands (option `demotion`);
- it is charged for its own share of an iteration, and joins the back of the lower level;
- waiting for longer than the starvation threshold lifts a job before level 0 with a fresh quantum,
  but only a share of the rows at a time, so that overload does not turn into round robin.
"""

from __future__ import annotations

from typing import Any

from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.policies.base import CLASSES, Key, Promoting, class_rank
from fastserve.scheduler.core.types import Demotion, JobState


class Mlfq(Promoting):
    """Every job begins at the highest level."""

    name = "mlfq"
    preemptive = True
    fair = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Quanta in units of q1.
        self._growth = [self.config.quantum_ratio**level for level in range(self.config.levels)]

    def key(self, job: Job) -> Key:
        # Lifted jobs, then the classes; priority; level, in it those with a row first. Keys are
        # compared all the time: as few numbers as possible.
        first = class_rank(job) - CLASSES if job.boosted else class_rank(job)
        level = 2 * job.level + (job.state is not JobState.RUNNING)
        return (first, job.spec.priority, level, job.place)

    def quantum(self, level: int) -> float:
        """Seconds of service in a level."""
        return (self.config.quantum_s or self.cost.decode_s) * self._growth[level]

    def quanta(self) -> list[float]:
        quantum = self.quantum(0)
        return [quantum * growth for growth in self._growth]

    def limits(self) -> list[float]:
        return self.quanta()

    def sink(self, job: Job) -> None:
        quantum = self.quantum(job.level)
        last = self.config.levels - 1
        if self.config.demotion is Demotion.ONE_LEVEL:
            job.level, job.used = min(job.level + 1, last), 0.0
        while job.used >= quantum:
            job.used -= quantum
            if job.level == last:
                job.used = 0.0  # round robin
                break
            job.level += 1
            quantum = self.quantum(job.level)
        job.place = self.next_place()
        self.settle(job)


class SkipJoinMlfq(Mlfq):
    """A job begins at the first level whose quantum holds its prefill."""

    name = "skip-join-mlfq"

    def join(self, job: Job) -> None:
        super().join(job)
        prefill = self.cost.prefill(job.known_len, self.budget)
        last = self.config.levels - 1
        level = 0
        while level < last and self.quantum(level) < prefill:
            level += 1
        job.level = level
