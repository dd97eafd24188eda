"""FastServe's own policy: feedback queues with soft aging.

Strict levels give short answers the best mean, and long ones a tail without end: past capacity the
last level only runs when nobody new comes. Here a level is not a wall but a handicap in time: jobs
go by `arrival + weight * level`. A newcomer overtakes whoever is `d` levels down unless that job
came more than `weight * d` seconds earlier. With a weight of 0 this is first come, first served,
with an infinite one skip-join MLFQ.

The weight follows the load, in units of what an average job takes: `mean service * max(1,
min(2 x^2, 2.5 x))`, x being the backlog in full batches. A fixed weight is either too timid under
overload, where the backlog makes all jobs old, or too bold at moderate load, where there is hardly
any mean to win and only a tail to lose. The square keeps bursts at moderate load from raising it.
docs/evaluation.md has the figures.
"""

from __future__ import annotations

from typing import Any, Final

from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.policies.base import Key, class_rank
from fastserve.scheduler.core.policies.mlfq import SkipJoinMlfq

# Weight in mean services: with no backlog, and per backlog in full batches.
_AT_LEAST: Final = 1.0
_SQUARE: Final = 2.0
_LINEAR: Final = 2.5
_FIRST_GUESS: Final = 256  # decode iterations of a job before any was seen to end
_CLASS_LEVELS: Final = (-4, 0, 6)  # interactive, default, batch
_NEWEST: Final = 0.01  # share of the newest job in the mean service
_CHANGE: Final = 0.1  # relative change of the weight that makes sorting anew worth while


class FastServe(SkipJoinMlfq):
    """By arrival plus a handicap per level, whose size follows the backlog. A class is a handicap
    of so many levels.

    Nobody waits without bound as long as priorities are equal: whoever comes later than a job's own
    key stays behind it for good.
    """

    name = "fastserve"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lifted_at_once = 0  # age is in the key
        self._service = _FIRST_GUESS * self.cost.decode_s
        self._weight = self._service

    def key(self, job: Job) -> Key:
        handicap = job.level + _CLASS_LEVELS[class_rank(job)]
        return (job.spec.priority, job.spec.arrival + self._weight * handicap, job.place)

    def promote(self, job: Job, now: float) -> bool:
        return False

    def leave(self, job: Job) -> None:
        self._service += _NEWEST * (job.attained - self._service)

    def resort(self, now: float, waiting: int) -> bool:
        backlog = waiting / self.rows
        weight = self._service * max(_AT_LEAST, min(_SQUARE * backlog**2, _LINEAR * backlog))
        if abs(weight - self._weight) <= _CHANGE * self._weight:
            return False
        self._weight = weight
        return True
