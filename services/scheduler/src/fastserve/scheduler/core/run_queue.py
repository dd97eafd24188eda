"""The jobs of a worker group in the order of its policy."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import islice

from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.policies.base import Handicap, Handicaps, Key

_LONGEST = 512  # jobs of a run


class RunQueue:
    """A sorted sequence in runs of bounded length.

    A change costs two binary searches and the move of one run's memory, however many jobs wait;
    walking from the front is as long as the walk.
    """

    def __init__(self, key: Callable[[Job], Key]) -> None:
        self._key = key
        self._runs: list[tuple[list[Key], list[Job]]] = []  # keys beside jobs: quick to compare
        self._last: list[Key] = []  # the largest key of each run
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Job]:
        """Best first. The queue must not change while it is walked."""
        for _, jobs in self._runs:
            yield from jobs

    def first(self, count: int) -> list[Job]:
        """The best so many, or all if there are fewer."""
        best: list[Job] = []
        for _, jobs in self._runs:
            best += jobs[: count - len(best)]
            if len(best) == count:
                break
        return best

    def position(self, job: Job) -> Key:
        """By what it compares with others, of other queues of the kind as well."""
        return job.key

    def add(self, job: Job) -> None:
        self._insert(job, self._key(job))

    def remove(self, job: Job) -> None:
        at = bisect_left(self._last, job.key)
        keys, jobs = self._runs[at]
        place = bisect_left(keys, job.key)
        assert jobs[place] is job
        del keys[place], jobs[place]
        self._size -= 1
        if not keys:
            del self._runs[at], self._last[at]
        elif place == len(keys):
            self._last[at] = keys[-1]

    def update(self, job: Job) -> None:
        """What its key depends on may have changed."""
        key = self._key(job)
        if key != job.key:
            self.remove(job)
            self._insert(job, key)

    def _insert(self, job: Job, key: Key) -> None:
        job.key = key
        self._size += 1
        if not self._runs:
            self._runs.append(([key], [job]))
            self._last.append(key)
            return
        at = bisect_left(self._last, key)
        if at == len(self._last):  # behind all
            at -= 1
            self._last[at] = key
        keys, jobs = self._runs[at]
        place = bisect_left(keys, key)
        keys.insert(place, key)
        jobs.insert(place, job)
        if len(keys) > _LONGEST:
            half = len(keys) // 2
            self._runs[at : at + 1] = [(keys[:half], jobs[:half]), (keys[half:], jobs[half:])]
            self._last[at : at + 1] = [keys[half - 1], keys[-1]]

    def resort(self) -> None:
        """All keys may have changed."""
        jobs = list(self)
        for job in jobs:
            job.key = self._key(job)
        jobs.sort(key=_key_of)
        half = _LONGEST // 2
        runs = [jobs[at : at + half] for at in range(0, len(jobs), half)]
        self._runs = [([job.key for job in run], run) for run in runs]
        self._last = [run[-1].key for run in runs]


class HandicapQueue:
    """Jobs by rank and handicap, where what a handicap is worth may change at any time.

    Jobs of one handicap keep their order, whatever it is worth. So each handicap has a queue of its
    own, and a walk merges the fronts of these with what they are worth now: nothing is ever sorted
    anew.
    """

    def __init__(self, handicaps: Handicaps) -> None:
        self._handicap, self._rank = handicaps.handicap, handicaps.rank
        self._worth = handicaps.worth
        self._queues: dict[Handicap, RunQueue] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Job]:
        """Best first. The queue must not change while it is walked."""
        if len(self._queues) == 1:
            (queue,) = self._queues.values()
            return iter(queue)
        return self._merged()

    def first(self, count: int) -> list[Job]:
        """The best so many, or all if there are fewer."""
        return list(islice(self, count))

    def _merged(self) -> Iterator[Job]:
        fronts: list[tuple[float, float, float, float, Job, Iterator[Job]]] = []
        for handicap, queue in self._queues.items():
            jobs = iter(queue)
            worth = self._worth(handicap)
            for job in jobs:
                priority, at, place = job.key
                fronts.append((priority, at + worth, place, worth, job, jobs))
                break
        heapq.heapify(fronts)
        while fronts:
            _, _, _, worth, job, jobs = fronts[0]
            yield job
            for job in jobs:
                priority, at, place = job.key
                heapq.heapreplace(fronts, (priority, at + worth, place, worth, job, jobs))
                break
            else:
                heapq.heappop(fronts)

    def position(self, job: Job) -> Key:
        """By what it compares with others, of other queues of the kind as well."""
        priority, at, place = job.key
        return (priority, at + self._worth(job.handicap), place)

    def add(self, job: Job) -> None:
        self._size += 1
        job.handicap = handicap = self._handicap(job)
        queue = self._queues.get(handicap)
        if queue is None:
            queue = self._queues[handicap] = RunQueue(self._rank)
        queue.add(job)

    def remove(self, job: Job) -> None:
        self._size -= 1
        queue = self._queues[job.handicap]
        queue.remove(job)
        if not queue:
            del self._queues[job.handicap]

    def update(self, job: Job) -> None:
        """What its rank or its handicap depends on may have changed."""
        if self._handicap(job) == job.handicap:
            self._queues[job.handicap].update(job)
        else:
            self.remove(job)
            self.add(job)

    def resort(self) -> None:
        """All ranks may have changed."""
        for queue in self._queues.values():
            queue.resort()


def _key_of(job: Job) -> Key:
    return job.key
