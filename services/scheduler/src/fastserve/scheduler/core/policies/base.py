"""What a policy is: an order of the jobs of one worker group, and how service changes it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Final, Protocol

from fastserve.scheduler.core.config import SchedulerConfig
from fastserve.scheduler.core.cost_model import CostModel
from fastserve.scheduler.core.job import Job

Key = tuple[float, ...]
Handicap = tuple[int, ...]


# Lower is sooner. A class that is not listed counts as the middle one.
_CLASS_RANKS: Final = {"interactive": 0, "default": 1, "batch": 2}
CLASSES: Final = len(_CLASS_RANKS)
# Decode iterations of a job before any was seen to end, and the newest one's share in the mean.
_FIRST_GUESS: Final = 256
_NEWEST: Final = 0.01


def class_rank(job: Job) -> int:
    """Where the service class of a job stands: 0 before 1 before 2."""
    return _CLASS_RANKS.get(job.spec.service_class, 1)


class Handicaps(Protocol):
    """Makes keys of a priority, a moment, a handicap and a place: jobs go by priority, then by the
    moment plus what the handicap is worth, which may change at any time; the place breaks ties."""

    def rank(self, job: Job) -> tuple[float, float, float]:
        """Priority, moment and place: the order of the jobs of one handicap."""

    def handicap(self, job: Job) -> Handicap:
        """How far it is put back; few different ones, for each has a queue of its own."""

    def worth(self, handicap: Handicap) -> float:
        """Seconds that a handicap stands for now."""


class Policy(ABC):
    """Orders jobs by `key`, smallest first; keys of different jobs differ.

    A key depends on the job alone (its level, its place, whether it has a row) and only changes in
    the calls below or when the job starts or stops, so that the jobs can be kept sorted. Where keys
    have `handicaps`, these may be worth more or less after every `weigh`.
    """

    name: ClassVar[str]
    preemptive: ClassVar[bool]  # a waiting job may take the row or the memory of a running one
    fair: ClassVar[bool] = False  # the tenants of a class share service, see `FairQueue`
    handicaps: Handicaps | None = None  # what its keys are made up of

    mean_service_s: float  # that jobs took which ended
    lifted_at_once = 0  # most jobs that stand before all others for having starved; 0: none ever

    def __init__(
        self,
        config: SchedulerConfig,
        cost: CostModel,
        *,
        rows: int,
        budget: int,
        place: Callable[[], int],
    ) -> None:
        """`rows`, `budget`: most rows and tokens of an iteration. `place`: counts up."""
        self.config, self.cost = config, cost
        self.rows, self.budget = rows, budget
        self.next_place = place
        self._unlimited = [math.inf] * config.levels
        self.mean_service_s = _FIRST_GUESS * cost.decode_s

    @abstractmethod
    def key(self, job: Job) -> Key:
        """Position in the order."""

    @abstractmethod
    def quanta(self) -> list[float]:
        """Seconds of service per level; 0 for no limit."""

    def join(self, job: Job) -> None:
        """A new job: choose its level and its place."""
        job.place = self.next_place()

    def admit(self, job: Job) -> None:  # noqa: B027  # most have nothing to note
        """A job comes to this group, new or from elsewhere: note what its key needs."""

    def limits(self) -> list[float]:
        """By level, the seconds `used` in it at which a job sinks. Asked for once per iteration."""
        return self._unlimited

    def sink(self, job: Job) -> None:  # noqa: B027  # most have no limits
        """It has reached the limit of its level: its key changes."""

    def promote(self, job: Job, now: float) -> bool:
        """Lift a waiting job that starves. Called for the longest waiting first, until False."""
        return False

    def leave(self, job: Job) -> None:  # noqa: B027  # most have nothing to do
        """The job is over or goes to another group."""

    def ended(self, job: Job) -> None:
        """The job, which has left, is over."""
        self.mean_service_s += _NEWEST * (job.attained - self.mean_service_s)

    def size(self, waiting: int) -> tuple[int, int]:
        """Most rows and most tokens of the next iteration. waiting: jobs without a row."""
        return self.rows, self.budget

    def weigh(self, now: float, waiting: int, running: int) -> None:  # noqa: B027  # most have none
        """A plan is to be made: what are handicaps worth now?

        waiting, running: jobs that the last plan left without and with a row.
        """

    def resort(self, now: float) -> bool:
        """Whether keys have changed as time went by: then the whole queue is sorted anew.

        Asked before every plan, of long queues only after many changes
        (`FairQueue.may_resort`); should rarely say yes.
        """
        return False


class Promoting(Policy):
    """Lifts jobs that wait for too long before all others, but only to a share of the rows at a
    time, so that overload does not turn into round robin."""

    _lifted = 0  # jobs that stand before the others

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lifted_at_once = max(1, int(self.rows * self.config.promotion_share))

    def promote(self, job: Job, now: float) -> bool:
        if now - job.wait_since < self.config.starvation_s:
            return False
        if self._lifted >= self.lifted_at_once:
            return False
        self._lifted += 1
        job.boosted, job.level, job.used = True, 0, 0.0
        job.place = self.next_place()
        return True

    def leave(self, job: Job) -> None:
        self.settle(job)

    def settle(self, job: Job) -> None:
        """It stands among the others again."""
        if job.boosted:
            job.boosted = False
            self._lifted -= 1
