"""Who leaves the device, and who comes back: KV operations of a plan.

Jobs are ordered by when they will run next, as far as the policy's order tells: the last of it
leave first, the first come back first. Three occasions:
- a job that should run has no room: worse ones leave, at once and for it;
- ahead of need, few blocks are free: jobs without a row leave until a reserve is free, so that the
  next newcomer finds room;
- ahead of need, many blocks are free: jobs on the host that are next in the order come back.
The last wants twice the reserve to be left, so that no job goes to and fro.
"""

from __future__ import annotations

from collections.abc import Iterable

from fastserve.scheduler.core.draft import Draft, host_need
from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.types import JobState, KvOpKind, KvState

# More of the device than this is never kept idle.
_LARGEST_RESERVE = 0.25


def make_room(draft: Draft, job: Job, need: int) -> bool:
    """Let worse jobs leave until `need` blocks are or will be free. True if they are free now."""
    coming = draft.spare + draft.leaving
    any_victim = draft.group.policy.preemptive or job.state is JobState.RUNNING
    for victim in _victims(draft):
        if coming >= need or victim.key <= job.key:
            break
        booked = victim.booked
        if (any_victim or victim.state is not JobState.RUNNING) and _evict(
            draft, victim, forced=True
        ):
            coming += booked
    return draft.spare >= need


def keep_reserve(draft: Draft) -> None:
    """Let jobs without a row leave until the reserve is or will be free."""
    reserve = _reserve(draft)
    missing = min(reserve, reserve - draft.spare - draft.leaving)
    if missing <= 0:
        return
    for victim in _victims(draft):
        if victim.state is JobState.RUNNING or victim in draft.starved:
            continue
        booked = victim.booked
        if _evict(draft, victim, forced=False):
            missing -= booked
            if missing <= 0:
                break


def bring_back(draft: Draft, next_jobs: Iterable[Job]) -> None:
    """Upload jobs that will run soon, in their order, while plenty is free."""
    group = draft.group
    left = 2 * _reserve(draft)
    for job in next_jobs:
        if job.kv is KvState.HOST and job.op is None:
            if draft.spare - group.need(job, group.config.lease) < left:
                break
            draft.operate(KvOpKind.UPLOAD, job)


def _reserve(draft: Draft) -> int:
    """Idle blocks to keep: an average newcomer, and the growth of all rows during a lease."""
    group = draft.group
    growth = group.blocks(group.max_rows * group.config.lease)
    wanted = round(group.newcomer_blocks) + growth
    return min(wanted, int(group.info.device_blocks * _LARGEST_RESERVE))


def _victims(draft: Draft) -> list[Job]:
    """Jobs whose device blocks could be freed, the one that runs last first."""
    idle = [job for job in draft.group.resident if job.op is None and job not in draft.chosen]
    idle.sort(key=lambda job: job.key, reverse=True)
    return idle


def _evict(draft: Draft, victim: Job, *, forced: bool) -> bool:
    """Take the device blocks of a job away. False: not now, or not without losing its KV.

    `forced`: rather lose it than keep a better job waiting.
    """
    group = draft.group
    if victim.host_tokens >= victim.computed and not victim.pending:
        draft.operate(KvOpKind.DROP_DEVICE, victim)  # the host copy is complete
        return True
    missing = host_need(group, victim) - victim.host_booked - group.host_free
    if missing <= 0:
        draft.operate(KvOpKind.OFFLOAD, victim)
        return True
    if _drop_copies(draft, victim, missing):
        return False  # there will be room on the host soon
    if forced:
        draft.operate(KvOpKind.DROP_DEVICE, victim)
    return forced


def _drop_copies(draft: Draft, victim: Job, missing: int) -> bool:
    """Free host blocks that only double what is on the device. True if enough will be free."""
    group = draft.group
    if group.info.host_blocks == 0:
        return False
    under_way = [op.job for op in group.ops.values() if op.kind is KvOpKind.DROP_HOST and op.job]
    missing -= sum(job.host_booked for job in under_way)
    doubled = [job for job in _victims(draft) if job.host_booked and job is not victim]
    if missing > sum(job.host_booked for job in doubled):
        return False
    for job in doubled:
        if missing <= 0:
            break
        missing -= job.host_booked
        draft.operate(KvOpKind.DROP_HOST, job)
    return True
