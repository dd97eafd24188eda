"""Deadlines: a job ends when it cannot meet its own any more, not only when it has passed."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Final

from fastserve.scheduler.core.cost_model import Work, chunk
from fastserve.scheduler.core.group import Group
from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.types import JobSpec, JobState

# Share of the least time that is believed: an early end cannot be taken back.
_BELIEVED: Final = 0.5
# Iterations after which the error of the model says something.
_PROVEN: Final = 64


def least_seconds(group: Group, spec: JobSpec, job: Job | None = None) -> float:
    """Seconds that a job needs at the very least: it alone, without a pause, by the cost model.

    What is left of its prefill, then the output that is certain. The model is trusted as far as it
    was right so far: (1 + its error) is by how much it has overestimated, if it did, and half of
    what remains is left out as well. 0 before it could prove itself. `job` None: nothing is
    computed yet.
    """
    cost, budget = group.cost, group.max_tokens
    if cost.samples < _PROVEN:
        return 0.0
    known, computed, output = len(spec.prompt), 0, 0
    if job is not None:
        known, output = job.known_len, len(job.output)
        computed = min(max(job.computed, job.host_tokens), known - 1)
    decode = cost.seconds(Work(0, 0, 1, known))
    steps = [
        decode if known - start == 1 else cost.seconds(chunk(start, min(budget, known - start)))
        for start in range(computed, known, budget)
    ]
    seconds = sum(steps)
    more = min(spec.min_tokens, spec.max_tokens) - output - 1  # one comes with the prefill
    if more > 0:
        seconds += more * decode
    if job is not None and job.state is JobState.RUNNING:
        seconds -= steps[0]  # the iteration under way may be over at any moment
    return seconds * _BELIEVED / (1 + cost.error)


class Deadlines:
    """The jobs that have one, by when they have to be looked at again."""

    def __init__(self, group_of: Callable[[Job], Group | None]) -> None:
        self._group_of = group_of
        self._heap: list[tuple[float, int, Job]] = []

    def watch(self, job: Job) -> None:
        """A live job; one without a deadline is not noted."""
        if job.spec.deadline is not None:
            heapq.heappush(self._heap, (self._latest(job), job.seq, job))

    def due(self, now: float) -> Iterator[Job]:
        """Live jobs whose deadline has passed or cannot be met; each is to be ended."""
        while self._heap and self._heap[0][0] <= now:
            job = heapq.heappop(self._heap)[2]
            if not job.live:
                continue
            latest = self._latest(job)  # later than it was, if it got on meanwhile
            if latest > now:
                heapq.heappush(self._heap, (latest, job.seq, job))
            else:
                yield job

    def _latest(self, job: Job) -> float:
        """When it has to go on at the latest."""
        assert job.spec.deadline is not None
        group = self._group_of(job)
        if group is None:
            return job.spec.deadline
        return job.spec.deadline - least_seconds(group, job.spec, job)
