"""The jobs of a worker group in the order of its policy."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.policies.base import Key


class RunQueue:
    """A sorted list: changes cost a binary search and a move of memory, walking from the front is
    as long as the walk."""

    def __init__(self, key: Callable[[Job], Key]) -> None:
        self._key = key
        self._entries: list[tuple[Key, Job]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Job]:
        """Best first. The queue must not change while it is walked."""
        return (job for _, job in self._entries)

    def add(self, job: Job) -> None:
        job.key = self._key(job)
        insort(self._entries, (job.key, job))

    def remove(self, job: Job) -> None:
        at = bisect_left(self._entries, (job.key,))  # shorter than the entry: sorts right before it
        assert self._entries[at][1] is job
        del self._entries[at]

    def update(self, job: Job) -> None:
        """What its key depends on has changed."""
        self.remove(job)
        self.add(job)

    def resort(self) -> None:
        """All keys may have changed."""
        for _, job in self._entries:
            job.key = self._key(job)
        self._entries = sorted((job.key, job) for _, job in self._entries)
