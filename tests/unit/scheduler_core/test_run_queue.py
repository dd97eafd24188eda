"""The sorted queue against a sorted list, with enough jobs for many runs."""

from __future__ import annotations

import random

from fastserve.scheduler.core import Job, JobSpec
from fastserve.scheduler.core.fair_queue import FairQueue
from fastserve.scheduler.core.run_queue import HandicapQueue, RunQueue


def test_it_is_a_sorted_sequence_whatever_happens() -> None:
    numbers = random.Random(3)
    jobs = [Job(JobSpec(str(n), range(1), 1, 0.0), n, 0.0) for n in range(4000)]
    for job in jobs:
        job.limit = numbers.random()
    weight = 1.0
    queue = RunQueue(lambda job: (weight * job.limit, job.seq))
    inside: set[Job] = set()
    for step in range(20_000):
        job = numbers.choice(jobs)
        if job not in inside:
            queue.add(job)
            inside.add(job)
        elif numbers.random() < 0.3:
            queue.remove(job)
            inside.discard(job)
        else:
            job.limit = numbers.random()
            queue.update(job)
        if step % 5000 == 4999:
            weight = -weight
            queue.resort()
        if step % 1000 == 0:
            assert list(queue) == sorted(inside, key=lambda job: job.key)
            assert len(queue) == len(inside)
    for job in list(queue):
        queue.remove(job)
    assert list(queue) == [] and len(queue) == 0


def test_the_first_are_the_best_however_many_runs_they_take() -> None:
    jobs = [Job(JobSpec(str(n), range(1), 1, 0.0), n, 0.0) for n in range(2000)]
    queue = RunQueue(lambda job: (-job.seq,))
    for job in jobs:
        queue.add(job)
    best_first = jobs[::-1]
    for count in (0, 1, 600, 2000, 5000):
        assert queue.first(count) == best_first[:count]


class Ages:
    """Handicaps of 0 to 4, all worth the same or nothing."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def rank(self, job: Job) -> tuple[float, float, float]:
        return (job.spec.priority, job.spec.arrival, job.place)

    def handicap(self, job: Job) -> tuple[int, ...]:
        return (job.level,)

    def worth(self, handicap: tuple[int, ...]) -> float:
        return self.seconds * handicap[0]

    def key(self, job: Job) -> tuple[float, float, float]:
        return (job.spec.priority, job.spec.arrival + self.worth((job.level,)), job.place)


def test_handicaps_may_be_worth_more_or_less_without_sorting_anew() -> None:
    numbers = random.Random(5)
    jobs = [
        Job(JobSpec(str(n), range(1), 1, n // 3, priority=numbers.choice((0, 0, 1))), n, 0.0)
        for n in range(2000)
    ]
    ages = Ages()
    queue = HandicapQueue(ages)
    inside: set[Job] = set()
    for step in range(12_000):
        job = numbers.choice(jobs)
        if job not in inside:
            queue.add(job)
            inside.add(job)
        elif numbers.random() < 0.3:
            queue.remove(job)
            inside.discard(job)
        else:
            job.level = numbers.randint(0, 4)
            job.place += numbers.choice((0, 2000))
            queue.update(job)
        if step % 300 == 0:
            ages.seconds = numbers.choice((0.0, 1.0, 10.0, 500.0))
            expected = sorted(inside, key=ages.key)
            assert list(queue) == sorted(inside, key=queue.position) == expected
            assert queue.first(64) == expected[:64]
            assert len(queue) == len(inside)
    for job in list(queue):
        queue.remove(job)
    assert list(queue) == [] and len(queue) == 0


def test_a_long_queue_is_sorted_anew_only_after_as_many_changes() -> None:
    jobs = [Job(JobSpec(str(n), range(1), 1, 0.0), n, 0.0) for n in range(1025)]
    queue = FairQueue(lambda job: (job.seq,), fair=True)
    for job in jobs:
        queue.add(job)
    queue.resort()
    assert not queue.may_resort()
    for job in jobs[:1024]:
        queue.update(job)
    assert not queue.may_resort()
    queue.update(jobs[-1])
    assert queue.may_resort()
    queue.resort()
    queue.remove(jobs[0])
    assert queue.may_resort(), "a short one at any time"
