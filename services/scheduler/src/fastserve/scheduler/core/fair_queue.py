"""The jobs of a worker group in order: the policy's, with service shared fairly between tenants.

Within one service class the next row goes to the tenant that attained the least service for its
weight. Among the jobs of a tenant, and between classes, the policy decides. A walk from the front
counts a row that it hands out as a second of service to come, so that the rows of a plan alternate
between tenants and what one lacks is made up row by row, not by swapping everything at once.

Service counts while tenants compete. A tenant whose jobs all have rows wants no more than it gets:
it saves nothing up, but stays level with the least served of those that wait. A tenant that was
away comes back there, too.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Final

from fastserve.scheduler.core.errors import IntegrityError
from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.policies.base import Handicaps, Key, class_rank
from fastserve.scheduler.core.run_queue import HandicapQueue, RunQueue
from fastserve.scheduler.core.types import JobState

# Service that a row handed out stands for, at weight 1.
_ROW_S: Final = 1.0
# A job without a row gets the row of another tenant's only if that has had so much more.
_KEEP_S: Final = 0.5
_QUICK: Final = 1024  # jobs that may be sorted anew at any time


class Lane:
    """What one tenant has in one service class."""

    __slots__ = ("attained", "home", "jobs", "number", "running")

    def __init__(self, home: tuple[int, str], jobs: RunQueue | HandicapQueue, number: int) -> None:
        self.home = home  # rank of the class, tenant
        self.jobs = jobs
        self.number = number  # breaks ties
        self.attained = 0.0  # seconds of service by weight, while it competed
        self.running = 0  # jobs with a row

    @property
    def contends(self) -> bool:
        """It would take more rows than it has."""
        return len(self.jobs) > self.running


def _order(lane: Lane) -> tuple[float, int]:
    return lane.attained, lane.number


class _Tenants:
    """The lanes of one service class, the least served first."""

    def __init__(self) -> None:
        self.lanes: list[Lane] = []
        self.lifted = 0  # jobs that were lifted because they starved

    def enter(self, lane: Lane) -> None:
        self.level()
        first = next((lane for lane in self.lanes if lane.contends), None)
        if first is not None:
            lane.attained = first.attained
        elif self.lanes:
            lane.attained = self.lanes[-1].attained
        insort(self.lanes, lane, key=_order)

    def leave(self, lane: Lane) -> None:
        del self.lanes[bisect_left(self.lanes, _order(lane), key=_order)]

    def charge(self, lane: Lane, seconds: float) -> None:
        self.leave(lane)
        lane.attained += seconds
        insort(self.lanes, lane, key=_order)

    def level(self) -> None:
        """Raise the lanes that want no more to the least served of those that do."""
        lanes = self.lanes
        first = next((lane for lane in lanes if lane.contends), None)
        least = first or (lanes[-1] if lanes else None)
        while least is not None and lanes[0].attained < least.attained:
            lane = lanes.pop(0)
            lane.attained = least.attained
            insort(lanes, lane, key=_order)

    def __iter__(self) -> Iterator[Job]:
        """Jobs in the order in which they get rows. As long as the walk, whoever else waits."""
        if len(self.lanes) == 1:
            return iter(self.lanes[0].jobs)
        return self._shared()

    def _shared(self) -> Iterator[Job]:
        running = JobState.RUNNING
        job: Job | None
        entering = iter(self.lanes)
        lane = next(entering, None)
        heap: list[tuple[float, int, float, Job, Iterator[Job]]] = []
        while True:
            while lane is not None and (not heap or lane.attained <= heap[0][0]):
                jobs = iter(lane.jobs)
                job = next(jobs, None)
                if job is not None:
                    attained = lane.attained
                    position = attained if job.state is running else attained + _KEEP_S
                    heapq.heappush(heap, (position, lane.number, attained, job, jobs))
                lane = next(entering, None)
            if not heap:
                return
            _, number, attained, job, jobs = heap[0]
            yield job
            attained += _ROW_S / job.spec.tenant_weight
            job = next(jobs, None)
            if job is None:
                heapq.heappop(heap)
            else:
                position = attained if job.state is running else attained + _KEEP_S
                heapq.heapreplace(heap, (position, number, attained, job, jobs))


class FairQueue:
    """All jobs of a group. With one tenant, and where nothing is shared, a plain `RunQueue`.

    A job that was lifted because it starved comes first of its tenant's, and takes its class with
    it before the others until it had its turn: so nobody starves, and nobody who floods the queue
    gets more than a share by it.
    """

    def __init__(
        self, key: Callable[[Job], Key], *, fair: bool, handicaps: Handicaps | None = None
    ) -> None:
        """fair: share between tenants; else all jobs stand in one lane. handicaps: what makes up
        the keys, if they change with time."""
        self._key = key
        self._handicaps = handicaps
        self._fair = fair
        self._lanes: dict[tuple[int, str], Lane] = {}
        self._classes: dict[int, _Tenants] = {}
        self._lifted: set[Job] = set()
        self._due: dict[Lane, float] = {}  # service not counted yet
        self._numbers = 0
        self._size = 0
        self._changes = 0  # since all was sorted anew

    def __len__(self) -> int:
        return self._size

    @property
    def shared(self) -> bool:
        """Several tenants of one class have jobs: the order is not that of the keys alone."""
        return len(self._lanes) > len(self._classes)

    def __iter__(self) -> Iterator[Job]:
        """Best first. The queue must not change while it is walked."""
        if len(self._classes) == 1:
            (tenants,) = self._classes.values()
            return iter(tenants)
        return self._merged()

    def first(self, count: int) -> list[Job]:
        """The best so many, or all if there are fewer."""
        if len(self._lanes) == 1:
            (lane,) = self._lanes.values()
            return lane.jobs.first(count)
        return list(islice(self, count))

    def _merged(self) -> Iterator[Job]:
        """The classes by the key of the job that is next in each, one with lifted jobs first."""
        ahead = []
        for tenants in self._classes.values():
            jobs = iter(tenants)
            job = next(jobs)
            ahead.append((not tenants.lifted, self.position(job), job, tenants.lifted, jobs))
        while ahead:
            best = min(ahead)
            _, _, job, lifted, jobs = best
            yield job
            lifted -= job.boosted
            following = next(jobs, None)
            if following is None:
                ahead.remove(best)
            else:
                key = self.position(following)
                ahead[ahead.index(best)] = (not lifted, key, following, lifted, jobs)

    def add(self, job: Job) -> None:
        """A job without a row."""
        self._size += 1
        self._changes += 1
        home = (class_rank(job), job.spec.tenant) if self._fair else (0, "")
        lane = self._lanes.get(home)
        if lane is None:
            self._numbers += 1
            lane = self._lanes[home] = Lane(home, self._new_queue(), self._numbers)
            self._classes.setdefault(home[0], _Tenants()).enter(lane)
        job.lane = lane
        lane.jobs.add(job)
        self._count_lifted(job, lifted=job.boosted)

    def _new_queue(self) -> RunQueue | HandicapQueue:
        if self._handicaps is None:
            return RunQueue(self._key)
        return HandicapQueue(self._handicaps)

    def position(self, job: Job) -> Key:
        """Its key."""
        return job.lane.jobs.position(job)

    def positions(self, jobs: Iterable[Job]) -> list[tuple[Key, Job]]:
        """Jobs with their keys."""
        if self._handicaps is None:
            return [(job.key, job) for job in jobs]
        return [(self.position(job), job) for job in jobs]

    def remove(self, job: Job) -> None:
        self._size -= 1
        lane = job.lane
        lane.jobs.remove(job)
        lane.running -= job.state is JobState.RUNNING
        self._count_lifted(job, lifted=False)
        if not lane.jobs:
            del self._lanes[lane.home]
            self._due.pop(lane, None)
            rank = lane.home[0]
            self._classes[rank].leave(lane)
            if not self._classes[rank].lanes:
                del self._classes[rank]

    def update(self, job: Job) -> None:
        """What its key depends on has changed."""
        self._changes += 1
        job.lane.jobs.update(job)
        if job.boosted or self._lifted:
            self._count_lifted(job, lifted=job.boosted)

    def _count_lifted(self, job: Job, *, lifted: bool) -> None:
        if lifted is not (job in self._lifted):
            self._classes[job.lane.home[0]].lifted += 1 if lifted else -1
            self._lifted ^= {job}

    def start(self, job: Job) -> None:
        """It has a row from now on."""
        job.lane.running += 1
        self.update(job)

    def stop(self, job: Job) -> None:
        """It has none any more."""
        job.lane.running -= 1
        self.update(job)

    def may_resort(self) -> bool:
        """Whether sorting all anew is cheap beside the changes since the last time.

        A long queue is therefore sorted anew more rarely: the cost per change stays bounded.
        """
        return self._size <= max(_QUICK, self._changes)

    def resort(self) -> None:
        """All keys may have changed."""
        self._changes = 0
        for lane in self._lanes.values():
            lane.jobs.resort()

    def charge(self, job: Job, seconds: float) -> None:
        """Service of a job. Counts from the next `settle` on; only needed while `shared`."""
        due = self._due
        due[job.lane] = due.get(job.lane, 0.0) + seconds / job.spec.tenant_weight

    def settle(self) -> None:
        """Count what was charged. Before a walk; nothing to do while nothing is shared."""
        if self.shared:
            for lane, seconds in self._due.items():
                self._classes[lane.home[0]].charge(lane, seconds)
            for tenants in self._classes.values():
                tenants.level()
        self._due.clear()

    def check(self) -> None:
        """Raises `IntegrityError` if a lane is out of order or its counts are wrong."""
        for lane in self._lanes.values():
            keys = [self._key(job) for job in lane.jobs]
            if keys != sorted(keys) or keys != [self.position(job) for job in lane.jobs]:
                raise IntegrityError("a queue is out of order")
            running = sum(job.state is JobState.RUNNING for job in lane.jobs)
            if lane.running != running or not lane.jobs:
                raise IntegrityError(f"a lane counts {lane.running} of its jobs with a row")
        jobs = list(self)
        if len(jobs) != self._size or len(set(jobs)) != self._size:
            raise IntegrityError(f"{self._size} jobs, but the walk meets {len(jobs)}")
        if self._lifted != {job for job in jobs if job.boosted}:
            raise IntegrityError("a job is lifted, or is not, and the queue does not know")
        for tenants in self._classes.values():
            own = [job for lane in tenants.lanes for job in lane.jobs]
            if tenants.lifted != sum(job.boosted for job in own):
                raise IntegrityError(f"a class counts {tenants.lifted} lifted jobs")
            if tenants.lanes != sorted(tenants.lanes, key=_order):
                raise IntegrityError("tenants are out of order")
