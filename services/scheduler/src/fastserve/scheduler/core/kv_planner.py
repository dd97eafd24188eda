"""Who leaves the device, and who comes back: KV operations of a plan.

Jobs are ordered by when they will run next, as far as the policy's order tells: the last of it
leave first, the first come back first. Three occasions:
- a job that should run has no room: worse ones leave, at once and for it;
- ahead of need, few blocks are free: jobs without a row leave until a reserve is free, so that the
  next newcomer finds room;
- ahead of need, many blocks are free: jobs on the host that are next in the order come back.
The last wants twice the reserve to be left, so that no job goes to and fro.

With no room on the host either, a job that leaves loses what was computed. Jobs that take turns in
that would never end, so a job loses it only a few times for younger ones, and the oldest never
loses it again.
"""

from __future__ import annotations

from collections.abc import Iterable

from fastserve.scheduler.core.draft import Draft, host_need
from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.types import JobState, KvOpKind, KvState, KvStrategy

# More of the device than this is never kept idle.
_LARGEST_RESERVE = 0.25
# So often a job may lose its KV cache for a younger one.
_MOST_DROPS = 2


def make_room(draft: Draft, job: Job, need: int, *, starving: bool) -> int:
    """Let worse jobs leave until `need` blocks are or will be free; returns how many that are.

    Nobody leaves if all of them together are not enough: it would only come back.
    Jobs that come earlier in the order but did not fit either leave for an older one that starves:
    else each could hold what the other needs.
    """
    coming = draft.spare(resident=job.booked > 0) + draft.leaving
    if draft.group.config.kv_strategy is KvStrategy.DEFER and not (job.booked or starving):
        return coming
    any_victim = draft.group.policy.preemptive or job.state is JobState.RUNNING
    place = draft.place(job)
    worse = [
        victim
        for victim in _victims(draft)
        if (any_victim or victim.state is not JobState.RUNNING)
        and (draft.place(victim) > place or (starving and victim.seq > job.seq))
    ]
    if coming + sum(victim.booked for victim in worse) < need:
        return coming
    for victim in worse:
        if coming >= need:
            break
        booked = victim.booked
        if _evict(draft, victim, worse, gainer=job):
            coming += booked
    return coming


def held_up(draft: Draft) -> int:
    """Jobs among the first of the order, as many as there are rows, that have no row since KV is on
    its way: their own, or that of others who make room."""
    group = draft.group
    if not group.ops and not draft.promised:
        return 0
    moving = (KvOpKind.OFFLOAD, KvOpKind.UPLOAD)
    return sum(
        job not in draft.chosen and (job.op in moving or job in draft.promised)
        for job in draft.head[: group.max_rows]
    )


def keep_reserve(draft: Draft) -> None:
    """Let jobs without a row leave until the reserve is or will be free."""
    reserve = _reserve(draft)
    missing = min(reserve, reserve - draft.spare() - draft.leaving)
    if missing <= 0:
        return
    idle = [
        job
        for job in _victims(draft)
        if job.state is not JobState.RUNNING and job not in draft.starved
    ]
    for victim in idle:
        booked = victim.booked
        if missing <= 0:
            break
        if _evict(draft, victim, idle, gainer=None):
            missing -= booked


def bring_back(draft: Draft, next_jobs: Iterable[Job]) -> None:
    """Upload jobs that will run soon, in their order, while plenty is free."""
    group = draft.group
    if not group.host_used:
        return
    left = 2 * _reserve(draft)
    for job in next_jobs:
        if job.kv is KvState.HOST and job.op is None:
            if draft.spare() - group.need(job, group.config.lease) < left:
                break
            draft.operate(KvOpKind.UPLOAD, job)


def _reserve(draft: Draft) -> int:
    """Idle blocks to keep: as configured, or else room for an average newcomer and for the growth
    of all rows during a lease."""
    group = draft.group
    if group.config.kv_reserve_blocks is not None:
        return min(group.config.kv_reserve_blocks, group.info.device_blocks)
    growth = group.blocks(group.max_rows * group.config.lease)
    wanted = round(group.newcomer_blocks) + growth
    return min(wanted, int(group.info.device_blocks * _LARGEST_RESERVE))


def _victims(draft: Draft) -> list[Job]:
    """Jobs whose device blocks could be freed, the one that runs last first."""
    idle = [job for job in draft.group.resident if job.op is None and job not in draft.chosen]
    idle.sort(key=draft.place, reverse=True)
    return idle


def _evict(draft: Draft, victim: Job, others: list[Job], *, gainer: Job | None) -> bool:
    """Take the device blocks of a job away. False: not now, or not at the price of its KV.

    `others`: whose host copies may go for it. `gainer`: the job that waits for the blocks.
    """
    group = draft.group
    if victim.op is not None:
        return False
    if victim.host_tokens >= victim.computed and not group.pending(victim):
        draft.operate(KvOpKind.DROP_DEVICE, victim)  # the host copy is complete
        return True
    missing = host_need(group, victim) - victim.host_booked - group.host_free
    if group.config.kv_strategy is KvStrategy.RECOMPUTE:
        missing = max(missing, 1)  # as if the host were full
    if missing <= 0:
        draft.operate(KvOpKind.OFFLOAD, victim)
        return True
    if gainer is None or _drop_copies(draft, victim, others, missing):
        return False  # there will be room on the host soon
    if victim.drops < _MOST_DROPS or gainer.seq < victim.seq:
        victim.drops += 1
        draft.operate(KvOpKind.DROP_DEVICE, victim)
        return True
    return False


def _drop_copies(draft: Draft, victim: Job, others: list[Job], missing: int) -> bool:
    """Free host blocks that only double what is on the device. True if enough will be free."""
    group = draft.group
    if group.host_free <= 0 and group.host_used == 0:
        return False
    under_way = [op.job for op in group.ops.values() if op.kind is KvOpKind.DROP_HOST and op.job]
    missing -= sum(job.host_booked for job in under_way)
    doubled = [job for job in others if job.host_booked and job.op is None and job is not victim]
    if missing > sum(job.host_booked for job in doubled):
        return False
    for job in doubled:
        if missing <= 0:
            break
        missing -= job.host_booked
        draft.operate(KvOpKind.DROP_HOST, job)
    return True
