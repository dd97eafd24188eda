"""What a policy is: an order of the jobs of one worker group, and how service changes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Final

from fastserve.scheduler.core.cost_model import CostModel
from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.types import SchedulerConfig

Key = tuple[float, ...]


# Lower is sooner. A class that is not listed counts as the middle one.
_CLASS_RANKS: Final = {"interactive": 0, "default": 1, "batch": 2}


def class_rank(job: Job) -> int:
    """Where the service class of a job stands: 0 before 1 before 2."""
    return _CLASS_RANKS.get(job.spec.service_class, 1)


class Policy(ABC):
    """Orders jobs by `key`, smallest first; keys of different jobs differ.

    A key depends on the job alone (its level, its place, whether it has a row) and only changes in
    the calls below or when the job starts or stops, so that the jobs can be kept sorted.
    """

    name: ClassVar[str]
    preemptive: ClassVar[bool]  # a waiting job may take the row or the memory of a running one
    fair: ClassVar[bool] = False  # the tenants of a class share service, see `FairQueue`

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

    def charge(self, job: Job, seconds: float) -> bool:
        """The job had so much service. True if its level or its place changed."""
        return False

    def promote(self, job: Job, now: float) -> bool:
        """Lift a waiting job that starves. Called for the longest waiting first, until False."""
        return False

    def leave(self, job: Job) -> None:  # noqa: B027  # most have nothing to do
        """The job is over or goes to another group."""

    def resort(self, now: float, waiting: int) -> bool:
        """Whether keys have changed as time went by: then the whole queue is sorted anew.

        waiting: jobs without a row. Asked before every plan, of long queues only after many
        changes (`FairQueue.may_resort`); should rarely say yes.
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
