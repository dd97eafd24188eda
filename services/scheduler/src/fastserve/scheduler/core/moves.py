"""Which group a job belongs to, and when it goes to another one: on draining, and to even out.

A job that moves is released where it was and goes on elsewhere from its tokens; whatever the former
group still says of it is no news. Waiting jobs of a draining group go at once. Those with a row
follow as fast as their new group computes what it lacks, so that meanwhile the others decode on and
none of them pauses for the prompts of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

from fastserve.scheduler.core.group import Group, Leftover
from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.placement import Lengths, completion_s, tokens_to_compute
from fastserve.scheduler.core.types import (
    EventKind,
    JobState,
    KvOpKind,
    KvState,
    PreemptMode,
    PreemptReason,
)

Tell = Callable[[Job, EventKind, float], None]
# Seconds after which a job that came is not waited for any more before the next one comes.
_ARRIVAL_S: Final = 1.0
# A job moves to end sooner only if that saves this share of the time, and so many iterations.
_GAIN: Final = 0.2
_GAIN_ITERATIONS: Final = 4
# Estimates that differ by less than this share say nothing.
_AS_GOOD: Final = 0.1
# Moves per call, jobs that are looked at for one, and how much less crowded its new group must be.
_AT_ONCE: Final = 16
_LOOK: Final = 4
_LESS_CROWDED: Final = 0.7


class Moves:
    """Assigns jobs to groups. `groups`: those of the scheduler, by worker id."""

    def __init__(self, groups: Mapping[str, Group], tell: Tell, counters: Counter[str]) -> None:
        self._groups, self._tell, self._counters = groups, tell, counters
        self.lengths = Lengths()

    # --- one job -----------------------------------------------------------------------------

    def home(self, job: Job) -> Group | None:
        """The group at which it would end first, or of those that are as good the least crowded;
        None if none takes it."""
        able = [
            group
            for group in self._groups.values()
            if not group.draining and group.fits(job.max_len)
        ]
        if len(able) < 2:
            return able[0] if able else None
        times = [self.completion_s(group, job) for group in able]
        best = min(times) * (1 + _AS_GOOD)
        return min(
            (group for group, seconds in zip(able, times, strict=True) if seconds <= best),
            key=_crowd,
        )

    def completion_s(self, group: Group, job: Job) -> float:
        """Seconds until it would end there."""
        return completion_s(group, job, self.lengths)

    def settle(self, group: Group, job: Job, now: float) -> None:
        """It belongs to this group from now on, and waits."""
        job.wait_since = now
        if group.holds(job.job_id):  # it was here before, and is just being released
            job.op = KvOpKind.RELEASE
        group.add(job)

    def detach(self, group: Group, job: Job, *, over: bool) -> None:
        """It is over, or goes elsewhere: what it holds here is to be released."""
        group.remove(job, over=over)
        if job.named:
            group.to_release[job.job_id] = Leftover(job.booked, job.host_booked, job.op is not None)
        else:
            group.device_used -= job.booked

    def move(self, job: Job, group: Group, to: Group, reason: PreemptReason, now: float) -> None:
        """It goes on at `to`, from its tokens."""
        was_running = job.state is JobState.RUNNING
        for op in group.ops.values():
            if op.job is job:
                op.job = None
        self.detach(group, job, over=False)
        forget_kv(job)
        if was_running:
            job.state = JobState.PREEMPTED
            job.preemptions += 1
            self._counters[f"preemptions.{reason}.{PreemptMode.RECOMPUTE}"] += 1
            self._tell(job, EventKind.PREEMPTED, now)
        job.moved_len = job.known_len
        self.settle(to, job, now)
        if was_running:
            to.came[job] = now
        self._counters[f"migrations.{reason}"] += 1
        self._tell(job, EventKind.MIGRATED, now)

    # --- whole groups ------------------------------------------------------------------------

    def evacuate(self, group: Group, now: float) -> None:
        """Take jobs away from a draining group, as far as other groups take them."""
        for job in list(group.queue):
            running = job.state is JobState.RUNNING
            to = self.home(job)
            if to is not None and (not running or _has_time(to, job, now)):
                self.move(job, group, to, PreemptReason.DRAIN, now)

    def balance(self, now: float) -> None:
        """Let waiting jobs go where they end sooner, the first in the order before the others."""
        for group in self._groups.values():
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
            if job.state is JobState.RUNNING or job.op is not None:
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
        here = self.completion_s(group, job)
        times = [(self.completion_s(other, job), at) for at, other in enumerate(able)]
        there, at = min(times)
        to = able[at]
        if here - there <= max(_GAIN * here, _GAIN_ITERATIONS * to.cost.decode_s):
            return False
        self.move(job, group, to, PreemptReason.BALANCE, now)
        return True


def forget_kv(job: Job) -> None:
    """What its former group had of it counts no more."""
    job.kv = KvState.DROPPED if job.peak else KvState.NONE
    job.computed = job.host_tokens = job.booked = job.host_booked = job.last_plan = 0
    job.op, job.named = None, False


def _crowd(group: Group) -> float:
    """Jobs per row."""
    return len(group.jobs) / group.max_rows


def _has_time(group: Group, job: Job, now: float) -> bool:
    """Whether the group can compute what it lacks of the job beside that of others that came."""
    for other, since in list(group.came.items()):
        if other.remaining <= 1 or now - since > _ARRIVAL_S:
            del group.came[other]
    pending = sum(other.remaining for other in group.came)
    budget = group.policy.size(len(group.waiting))[1]
    return not pending or pending + tokens_to_compute(group, job) <= budget
