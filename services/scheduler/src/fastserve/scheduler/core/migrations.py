"""How a job goes from one group to another: from its tokens alone, or with its KV cache.

    WANTED ──EXPORT──▶ SENDING ──▶ SENT ──UPLOAD──▶ COMING ──▶ THERE ──▶ it goes on there

The KV goes ahead: while it is sent, and uploaded at the other group, the job decodes on where it
is. Then it goes on there, and computes what it got meanwhile as a short prompt; not before the next
iteration there has time for that beside what others lack who came, so that nobody pauses for it.
Whatever fails on the way costs the job nothing: it is still where it was, and moves from its tokens
alone. What lies at the other group for nothing is released there.

A job that has no row, or none to go on with at once, is not uploaded ahead: it goes on at the other
group as one whose KV is on the host.

What the former group still says of a job that moved is no news.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

from fastserve.scheduler.core.group import Group
from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.operations import Migration, Stage
from fastserve.scheduler.core.types import (
    EventKind,
    JobState,
    KvOpKind,
    KvState,
    KvStatus,
    OpDone,
    PreemptMode,
    PreemptReason,
)

Tell = Callable[[Job, EventKind, float], None]
# The host of the other group has it.
_ARRIVED: Final = frozenset({Stage.SENT, Stage.COMING, Stage.THERE})
# A group that could not be sent KV is left alone for so long.
_UNREACHABLE_S: Final = 5.0


class Migrations:
    """Moves jobs between groups. `groups`: those of the scheduler, by worker id."""

    def __init__(self, groups: Mapping[str, Group], tell: Tell, counters: Counter[str]) -> None:
        self._groups, self._tell, self._counters = groups, tell, counters

    # --- jobs --------------------------------------------------------------------------------

    def settle(self, group: Group, job: Job, now: float) -> None:
        """It belongs to this group from now on, and waits."""
        job.wait_since = now
        if group.holds(job.job_id):  # it was here before, and is just being released
            job.op = KvOpKind.RELEASE
        group.add(job)

    def detach(self, group: Group, job: Job, *, over: bool) -> None:
        """It is over, or goes elsewhere: what it holds here is to be released."""
        if job.migration is not None:
            self.give_up(job.migration)
        group.remove(job, over=over)
        group.introduce.pop(job.job_id, None)
        group.renew.pop(job, None)
        if job.named:
            busy = job.op is not None
            group.leave_behind(job.job_id, job.booked, job.host_booked, busy=busy)
        else:
            group.device_used -= job.booked

    def move(self, job: Job, group: Group, to: Group, reason: PreemptReason, now: float) -> None:
        """It goes on at `to`, from its tokens."""
        self._move(job, group, to, reason, now, None)

    def _move(
        self,
        job: Job,
        group: Group,
        to: Group,
        reason: PreemptReason,
        now: float,
        kv: Migration | None,
    ) -> None:
        was_running = job.state is JobState.RUNNING
        for op in group.ops.values():
            if op.job is job:
                op.job = None
        self.detach(group, job, over=False)
        forget_kv(job)
        if was_running:
            job.state = JobState.PREEMPTED
            job.preemptions += 1
            mode = PreemptMode.RECOMPUTE if kv is None else PreemptMode.SWAP
            self._counters[f"preemptions.{reason}.{mode}"] += 1
            self._tell(job, EventKind.PREEMPTED, now)
        if kv is not None:
            _take_over(job, kv)
        job.moved_len = job.known_len
        self.settle(to, job, now)
        if was_running:
            to.came[job] = (now, to.iteration)
            to.guests[job] = None
        self._counters[f"migrations.{reason}"] += 1
        self._tell(job, EventKind.MIGRATED, now)

    # --- KV ahead of its job -----------------------------------------------------------------

    def begin(self, job: Job, source: Group, to: Group, reason: PreemptReason) -> None:
        """Send its KV ahead, then let it follow. `to` must have room on its host."""
        host = source.blocks(sendable(source, job))
        migration = Migration(job, source, to, reason, host)
        job.migration = source.leaving[job] = to.coming[job.job_id] = migration
        to.host_used += host

    def sent(self, migration: Migration, done: OpDone, now: float) -> None:
        """The EXPORT has ended."""
        job, source, to = migration.job, migration.source, migration.to
        failed = done.status is not KvStatus.OK or not done.tokens
        if failed:
            source.unreachable[to.info.worker_id] = now + _UNREACHABLE_S
            self._counters["exports.failed"] += 1
        if migration.over:
            self._clear(migration)
            return
        migration.stage, migration.tokens = Stage.SENT, done.tokens
        to.host_used += to.blocks(done.tokens) - migration.host
        migration.host = to.blocks(done.tokens)
        running = job.state is JobState.RUNNING
        if failed or (running and migration.reason is PreemptReason.BALANCE):
            job.moved_len = job.known_len  # if it got a row meanwhile, it stays where it is
            self.give_up(migration)
            return
        # As many blocks as it will have by the time that it is there, if all goes well.
        device = to.blocks(job.bound(2 * to.config.lease))
        if running and device <= to.free:
            migration.device = device
            to.device_used += device
        else:
            self._arrive(migration, now)

    def came(self, migration: Migration, done: OpDone, now: float) -> None:
        """The UPLOAD ahead of the job has ended."""
        if done.status is KvStatus.OK:
            migration.stage, migration.tokens = Stage.THERE, done.tokens
            return
        self._counters["exports.failed"] += 1
        migration.source.unreachable[migration.to.info.worker_id] = now + _UNREACHABLE_S
        self.give_up(migration)

    def land(self, group: Group, now: float) -> None:
        """Before a plan of the group: jobs whose KV is there follow, the first come first, as far
        as those that have a row go on in the next iteration."""
        for migration in list(group.coming.values()):
            if migration.stage is not Stage.THERE:
                continue
            job = migration.job
            lacks = job.known_len - migration.tokens
            if job.state is JobState.RUNNING and not group.has_time(lacks):
                return
            self._arrive(migration, now)

    def _arrive(self, migration: Migration, now: float) -> None:
        job, source, to = migration.job, migration.source, migration.to
        job.migration = None
        del source.leaving[job], to.coming[job.job_id]
        self._counters["exports.moved"] += 1
        self._move(job, source, to, migration.reason, now, migration)

    def give_up(self, migration: Migration) -> None:
        """The job does not wait for it any more."""
        job = migration.job
        job.migration, migration.over = None, True
        migration.source.leaving.pop(job, None)
        if migration.stage is not Stage.SENDING:  # else what arrives is released afterwards
            self._clear(migration)

    def _clear(self, migration: Migration) -> None:
        """Nothing of it is to stay where it went."""
        job, to = migration.job, migration.to
        if to.coming.get(job.job_id) is not migration:
            return  # that group is gone
        del to.coming[job.job_id]
        if migration.stage is Stage.WANTED or to.jobs.get(job.job_id) is job:
            # Nothing came, or it is there from its tokens: what came goes when it ends.
            to.host_used -= migration.host
            to.device_used -= migration.device
            return
        busy = migration.stage is Stage.COMING
        to.leave_behind(job.job_id, migration.device, migration.host, busy=busy)

    # --- groups ------------------------------------------------------------------------------

    def turn(self, group: Group, *, draining: bool) -> None:
        """The group begins or ceases to drain."""
        affected = [
            migration
            for migration in (group.coming.values() if draining else group.leaving.values())
            if draining or migration.reason is PreemptReason.DRAIN
        ]
        for migration in affected:
            if not migration.over:
                self.give_up(migration)

    def drop_useless(self, group: Group) -> None:
        """Give up what cannot begin, since the job has lost its KV meanwhile."""
        for job, migration in list(group.leaving.items()):
            lost = job.kv in (KvState.NONE, KvState.DROPPED)
            if migration.stage is Stage.WANTED and lost:
                self.give_up(migration)

    def lost(self, group: Group) -> None:
        """The group is gone. Only migrations from it whose KV has arrived go on: see `rescue`."""
        for migration in list(group.coming.values()):
            if not migration.over:
                migration.job.migration, migration.over = None, True
                migration.source.leaving.pop(migration.job, None)
        group.coming.clear()
        for other in self._groups.values():
            for migration in list(other.coming.values()):
                if migration.source is not group or migration.stage in _ARRIVED:
                    continue
                if not migration.over:
                    self.give_up(migration)
                if migration.stage is Stage.SENDING:  # nobody will say how that ended
                    self._clear(migration)

    def rescue(self, job: Job, migration: Migration, now: float) -> None:
        """Its group is gone, but its KV is at another one: it goes on there."""
        to = migration.to
        job.migration = None
        del to.coming[job.job_id]
        uploads = migration.stage is Stage.COMING
        migration.stage = Stage.SENT
        _take_over(job, migration)
        if uploads:
            for op in to.ops.values():
                if op.migration is migration:
                    op.job, op.migration = job, None
            job.kv, job.op, job.booked = KvState.UPLOADING, KvOpKind.UPLOAD, migration.device
            to.renew[job] = None
            to.introduce.pop(job.job_id, None)
        elif migration.stage is Stage.SENT:
            to.device_used -= migration.device
        self.settle(to, job, now)


def _take_over(job: Job, migration: Migration) -> None:
    """The job has what came at its new group."""
    to = migration.to
    job.named = True
    job.host_tokens, job.host_booked = migration.tokens, migration.host
    if migration.stage is Stage.THERE:
        job.kv, job.computed, job.booked = KvState.DEVICE, migration.tokens, migration.device
        job.held_from = job.attained
        to.resident[job] = None
        to.renew[job] = None
    else:
        job.kv = KvState.HOST
        to.introduce[job.job_id] = migration.tokens


def forget_kv(job: Job) -> None:
    """What its former group had of it counts no more."""
    job.kv = KvState.DROPPED if job.peak else KvState.NONE
    job.computed = job.host_tokens = job.booked = job.host_booked = job.last_plan = 0
    job.op, job.named = None, False


def sendable(group: Group, job: Job) -> int:
    """Tokens whose KV the group can send: full blocks, or all that is on the host."""
    return max(job.host_tokens, job.computed - job.computed % group.info.block_size)
