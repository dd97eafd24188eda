"""FastServe's own policy: feedback queues with soft aging.

Strict levels give short answers the best mean, and long ones a tail without end: past capacity the
last level only runs when nobody new comes. Here a level is not a wall but a handicap in time: jobs
go by `arrival + weight * level`. A newcomer overtakes whoever is `d` levels down unless that job
came more than `weight * d` seconds earlier. With a weight of 0 this is first come, first served,
with an infinite one skip-join MLFQ.

Who has not used up the quantum of the level that it joined stands before nearly everyone: a first
token costs the others little, and keeps them from nothing for long.

The weight follows the load, in units of what an average job takes (`service`). While jobs seldom
wait there is hardly any mean to be won by overtaking, and a tail to be lost. Past capacity the
backlog makes all jobs old, so that a fixed weight would be first come, first served. With `x` jobs
waiting per row of an iteration, averaged over a minute or two since a burst is no load,

    weight = service * max(2 / running, min(16 x^2, max(5, 2.5 x)))

Of `running` jobs one ends every `service / running` seconds: where few run, an old one would keep
a newcomer waiting for long. Where memory lets fewer run than there are rows, x is small: each job
that begins and is overtaken needs memory, too. docs/evaluation.md has the figures.
"""

from __future__ import annotations

import math
from typing import Any, Final

from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.policies.base import Handicap, Key, class_rank
from fastserve.scheduler.core.policies.mlfq import SkipJoinMlfq

# Weight in mean services; x: jobs that wait per row of an iteration.
_LEAST: Final = 2.0  # over the number of jobs that run
_SQUARE: Final = 16.0  # per x^2
_MOST: Final = 5.0  # at moderate load
_LINEAR: Final = 2.5  # per x beyond it
_MEMORY_S: Final = 100.0  # over which x is averaged
_BURST: Final = 2.0  # what x exceeds this by counts at once
# Head start of newcomers, in levels and in seconds.
_HEAD_LEVELS: Final = 8
_HEAD_S: Final = 60.0
_CLASS_LEVELS: Final = (-4, 0, 6)  # interactive, default, batch
_WORTH: Final = 0.05  # of the throughput that a row adds where rows cost nothing
_FEWEST: Final = 16  # rows: below them a model that is wrong would cost more than it could win
_SEEN: Final = 64  # iterations before it is believed
_STRETCH: Final = 7.0  # decode iterations that a chunk of a prompt may take
_CHUNK: Final = 64  # tokens, at least
_CHANGE: Final = 0.1  # a smaller relative change of the weight is not followed


class FastServe(SkipJoinMlfq):
    """By arrival plus a handicap per level, whose size follows the backlog. A class is a handicap
    of so many levels.

    Nobody waits without bound as long as priorities are equal: whoever comes later than a job's own
    key, less the head start, stays behind it for good.
    """

    name = "fastserve"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.handicaps = self
        self.lifted_at_once = 0  # age is in the key
        self._weight = self.mean_service_s
        self._steady = self.mean_service_s  # the weight, but never less than a mean service
        self._backlog = 0.0
        self._asked = -math.inf  # when it was averaged last

    def key(self, job: Job) -> Key:
        priority, arrival, place = self.rank(job)
        return (priority, arrival + self.worth(self.handicap(job)), place)

    def rank(self, job: Job) -> tuple[float, float, float]:
        return (job.spec.priority, job.spec.arrival, job.place)

    def handicap(self, job: Job) -> Handicap:
        """Level, class, and whether it is a newcomer."""
        return (job.level, class_rank(job), job.newcomer)

    def worth(self, handicap: Handicap) -> float:
        level, rank, newcomer = handicap
        seconds = self._steady * _CLASS_LEVELS[rank]
        if newcomer:
            return seconds + self._steady * (level - _HEAD_LEVELS) - _HEAD_S
        return seconds + self._weight * level

    def join(self, job: Job) -> None:
        super().join(job)
        job.newcomer = True

    def sink(self, job: Job) -> None:
        super().sink(job)
        job.newcomer = False

    def size(self, waiting: int) -> tuple[int, int]:
        """Rows as long as another one is worth while; tokens so that an iteration with a chunk of a
        long prompt takes a few times a decode's, for whoever comes meanwhile waits for its end.
        The more jobs wait, the more throughput counts: half a decode's time for each."""
        rows = self.rows
        if self.cost.samples >= _SEEN:
            rows = min(rows, max(_FEWEST, int(min(self.cost.rows_worth(_WORTH), rows))))
        seconds = self.cost.decode_s * (_STRETCH + waiting / 2)
        chunk = max(_CHUNK, int(seconds * self.cost.prefill_tokens_per_s))
        return rows, min(self.budget, rows + chunk)

    def promote(self, job: Job, now: float) -> bool:
        return False

    def weigh(self, now: float, waiting: int, running: int) -> None:
        x = waiting / self.rows
        passed = now - self._asked
        self._asked = now
        self._backlog += (1.0 - math.exp(-passed / _MEMORY_S)) * (x - self._backlog)
        x = max(self._backlog, x - _BURST)
        services = max(_LEAST / max(running, 1), min(_SQUARE * x**2, max(_MOST, _LINEAR * x)))
        weight = self.mean_service_s * services
        if abs(weight - self._weight) > _CHANGE * self._weight:
            self._weight = weight
            self._steady = max(weight, self.mean_service_s)
