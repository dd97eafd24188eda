"""The jobs of a worker group in the order of its policy."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.policies.base import Key

_Entry = tuple[Key, Job]
_LONGEST = 512  # entries of a run


class RunQueue:
    """A sorted sequence in runs of bounded length.

    A change costs two binary searches and the move of one run's memory, however many jobs wait;
    walking from the front is as long as the walk.
    """

    def __init__(self, key: Callable[[Job], Key]) -> None:
        self._key = key
        self._runs: list[list[_Entry]] = []
        self._last: list[Key] = []  # the largest key of each run
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Job]:
        """Best first. The queue must not change while it is walked."""
        for run in self._runs:
            for _, job in run:
                yield job

    def first(self, count: int) -> list[Job]:
        """The best so many, or all if there are fewer."""
        jobs: list[Job] = []
        for run in self._runs:
            jobs += [job for _, job in run[: count - len(jobs)]]
            if len(jobs) == count:
                break
        return jobs

    def add(self, job: Job) -> None:
        job.key = key = self._key(job)
        self._size += 1
        if not self._runs:
            self._runs.append([(key, job)])
            self._last.append(key)
            return
        at = min(bisect_left(self._last, key), len(self._runs) - 1)
        run = self._runs[at]
        insort(run, (key, job))
        if len(run) > _LONGEST:
            half = len(run) // 2
            self._runs[at : at + 1] = [run[:half], run[half:]]
            self._last[at : at + 1] = [run[half - 1][0], run[-1][0]]
        else:
            self._last[at] = run[-1][0]

    def remove(self, job: Job) -> None:
        at = bisect_left(self._last, job.key)
        run = self._runs[at]
        place = bisect_left(run, (job.key,))  # shorter than the entry: sorts right before it
        assert run[place][1] is job
        del run[place]
        self._size -= 1
        if run:
            self._last[at] = run[-1][0]
        else:
            del self._runs[at], self._last[at]

    def update(self, job: Job) -> None:
        """What its key depends on has changed."""
        self.remove(job)
        self.add(job)

    def resort(self) -> None:
        """All keys may have changed."""
        jobs = list(self)
        for job in jobs:
            job.key = self._key(job)
        entries = sorted((job.key, job) for job in jobs)
        half = _LONGEST // 2
        self._runs = [entries[at : at + half] for at in range(0, len(entries), half)]
        self._last = [run[-1][0] for run in self._runs]
