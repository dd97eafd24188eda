"""When waiting jobs will run next, by estimate (ENST; FastServe paper, section 5).

The smaller of two terms: the time until the rule against starvation lifts the job, and the work
ahead of it in the order, spread over the rows. A job ahead counts with the quanta that it may use
up before it sinks behind the one that waits; without levels, with what jobs use to need.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, islice

from fastserve.scheduler.core.group import Group
from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.types import JobState


def next_scheduled(group: Group, head: Sequence[Job], now: float) -> dict[Job, float]:
    """Seconds from now for the jobs of `head`, the first of the order, and for as many that are
    next to be lifted: 0 for those that have a row.

    All others run later than the last of `head` and in the policy's order: whoever comes later in
    it has the same work ahead and more.
    """
    times = _by_work(group, head)
    last = times[head[-1]] if head else 0.0
    if not group.policy.lifted_at_once:
        return times
    starvation_s = group.config.starvation_s
    # They take turns, each for about an iteration.
    turn_s = group.cost.decode_s / group.policy.lifted_at_once
    for turn, job in enumerate(islice(group.waiting, len(head))):
        lift = max(job.wait_since + starvation_s - now, turn * turn_s)
        if lift < times.get(job, last):
            times[job] = lift
    return times


def _by_work(group: Group, head: Sequence[Job]) -> dict[Job, float]:
    quanta = group.policy.quanta()
    times: dict[Job, float] = {}
    running = JobState.RUNNING
    rows = group.max_rows
    latest = 0.0  # nobody runs before who is ahead of it
    if len(quanta) == 1:
        work = 0.0
        for job in head:
            times[job] = 0.0 if job.state is running else work / rows
            work += max(group.policy.mean_service_s - job.attained, group.cost.decode_s)
        return times
    # ends[k]: the service that takes a new job through the levels before k.
    ends = list(accumulate(quanta, initial=0.0))
    # Of the jobs so far: how many per level, service that they will have had when they sink behind
    # `level`, and service that they have had.
    ahead = [0] * len(quanta)
    work, done, level = 0.0, 0.0, -1
    for job in head:
        if job.level != level:
            level = job.level
            work = sum(n * ends[max(level, k + 1)] for k, n in enumerate(ahead) if n)
        latest = max(latest, (work - done) / rows)
        times[job] = 0.0 if job.state is running else latest
        ahead[level] += 1
        work += ends[level + 1]
        done += ends[level] + job.used
    return times
