"""Which group a job belongs to, and when it goes to another one: on draining, and to even out.

A job moves with its KV if that can be sent and is cheaper than computing it again
(`migrations.py`), else from its tokens alone. Then waiting jobs of a draining group go at once;
those with a row follow as fast as their new group computes what it lacks, so that meanwhile the
others decode on and none of them pauses for the prompts of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

from fastserve.scheduler.core.group import Group
from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.migrations import Migrations, Tell, forget_kv, sendable
from fastserve.scheduler.core.operations import Stage
from fastserve.scheduler.core.placement import (
    Lengths,
    can_send,
    completion_s,
    send_s,
    tokens_to_compute,
)
from fastserve.scheduler.core.types import EventKind, JobState, PreemptReason

# A job moves to end sooner only if that saves this share of the time, and so many iterations.
_GAIN: Final = 0.2
_GAIN_ITERATIONS: Final = 4
# Estimates that differ by less than this share say nothing.
_AS_GOOD: Final = 0.1
# Moves per call, jobs that are looked at for one, and how much less crowded its new group must be.
_AT_ONCE: Final = 16
_LOOK: Final = 4
_LESS_CROWDED: Final = 0.7
# Jobs of a group whose KV is sent at the same time.
_SENDING: Final = 4


class Moves:
    """Assigns jobs to groups. `groups`: those of the scheduler, by worker id."""

    def __init__(
        self,
        groups: Mapping[str, Group],
        migrations: Migrations,
        tell: Tell,
        counters: Counter[str],
    ) -> None:
        self._groups, self._migrations = groups, migrations
        self._tell, self._counters = tell, counters
        self.lengths = Lengths()

    # --- one job -----------------------------------------------------------------------------

    def home(self, job: Job, now: float) -> Group | None:
        """The group at which it would end first, or of those that are as good the least crowded;
        None if none takes it."""
        able = [
            group
            for group in self._groups.values()
            if not group.draining and group.fits(job.max_len)
        ]
        if len(able) < 2:
            return able[0] if able else None
        times = [self.completion_s(group, job, now) for group in able]
        best = min(times) * (1 + _AS_GOOD)
        return min(
            (group for group, seconds in zip(able, times, strict=True) if seconds <= best),
            key=_crowd,
        )

    def completion_s(self, group: Group, job: Job, now: float) -> float:
        """Seconds until it would end there."""
        source = None if job.worker_id is None else self._groups.get(job.worker_id)
        return completion_s(group, job, self.lengths, source, now)

    def _kv_pays(self, job: Job, source: Group, to: Group, now: float) -> bool:
        """Whether to send its KV ahead: cheaper than computing it, which delays all jobs there."""
        if not can_send(source, job, to, now):
            return False
        tokens = sendable(source, job)
        return send_s(source, to, tokens) < to.cost.more(0, tokens) * (len(to.jobs) + 1)

    def _send(self, job: Job, source: Group, to: Group, reason: PreemptReason) -> None:
        """Some at a time: each is there sooner, and has computed less meanwhile."""
        stages = [migration.stage for migration in source.leaving.values()]
        if stages.count(Stage.WANTED) + stages.count(Stage.SENDING) < _SENDING:
            self._migrations.begin(job, source, to, reason)

    # --- whole groups ------------------------------------------------------------------------

    def evacuate(self, group: Group, now: float) -> None:
        """Take jobs away from a draining group, as far as other groups take them."""
        for job in list(group.queue):
            to = None if job.migration is not None else self.home(job, now)
            if to is None:
                continue
            if self._kv_pays(job, group, to, now):
                self._send(job, group, to, PreemptReason.DRAIN)
            elif job.state is not JobState.RUNNING or to.has_time(tokens_to_compute(to, job)):
                self._migrations.move(job, group, to, PreemptReason.DRAIN, now)

    def lose(self, group: Group, now: float) -> list[Job]:
        """The group is gone: its jobs go to others; those for which there is none."""
        self._migrations.lost(group)
        homeless = []
        for job in list(group.queue):
            was_running = job.state is JobState.RUNNING
            group.remove(job, over=False)
            if was_running:
                job.state = JobState.PREEMPTED
                job.preemptions += 1
                self._counters["preemptions.worker_lost.recompute"] += 1
                self._tell(job, EventKind.PREEMPTED, now)
            forget_kv(job)
            job.worker_id = None
            if job.migration is not None:
                self._migrations.rescue(job, job.migration, now)
            elif (home := self.home(job, now)) is not None:
                self._migrations.settle(home, job, now)
            else:
                homeless.append(job)
                continue
            self._counters["migrations.worker_lost"] += 1
        return homeless

    def balance(self, now: float) -> None:
        """Let waiting jobs go where they end sooner, the first in the order before the others."""
        for group in self._groups.values():
            self._migrations.drop_useless(group)
            if group.draining and group.jobs:
                self.evacuate(group, now)
        groups = [group for group in self._groups.values() if not group.draining]
        if len(groups) < 2:
            return
        for _ in range(_AT_ONCE):
            crowded = max(groups, key=_crowd)
            if not crowded.waiting or not self._relieve(crowded, groups, now):
                return

    def _relieve(self, crowded: Group, groups: list[Group], now: float) -> bool:
        limit = _LESS_CROWDED * _crowd(crowded)
        others = [group for group in groups if group is not crowded and _crowd(group) < limit]
        if not others:
            return False
        looked = 0
        for job in crowded.queue.first(crowded.max_rows + len(crowded.ops) + _LOOK):
            if job.state is JobState.RUNNING or job.op is not None or job.migration is not None:
                continue
            if job.known_len <= job.moved_len:  # it has not got further since it moved
                continue
            able = [group for group in others if group.fits(job.max_len)]
            if able and self._gains(job, crowded, able, now):
                return True
            looked += 1
            if looked == _LOOK:
                break
        return False

    def _gains(self, job: Job, group: Group, able: list[Group], now: float) -> bool:
        here = self.completion_s(group, job, now)
        times = [(self.completion_s(other, job, now), at) for at, other in enumerate(able)]
        there, at = min(times)
        to = able[at]
        if here - there <= max(_GAIN * here, _GAIN_ITERATIONS * to.cost.decode_s):
            return False
        if self._kv_pays(job, group, to, now):
            self._send(job, group, to, PreemptReason.BALANCE)
        else:
            self._migrations.move(job, group, to, PreemptReason.BALANCE, now)
        return True


def _crowd(group: Group) -> float:
    """Jobs per row, those on their way counted where they will be."""
    return (len(group.jobs) - len(group.leaving) + len(group.coming)) / group.max_rows
