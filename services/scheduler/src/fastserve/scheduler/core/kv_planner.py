"""Who leaves the device, and who comes back: KV operations of a plan.

Jobs are ordered by when they will run next, by estimate (`enst.py`): the last leave first, the
first come back first. Three occasions:
- a job that should run has no room: worse ones leave, at once and for it;
- ahead of need, few blocks are free: jobs without a row leave until a reserve is free, so that
  newcomers and growing rows find room while others are still leaving;
- ahead of need, jobs on the host come back: while plenty is free, and the next few in line, or who
  is to run by the time an upload ends, also in place of jobs that run so much later that they can
  be back.
Plenty is twice the reserve, and who leaves for a job that comes back has time for both ways, so
that no job goes to and fro.

`eviction.py` says who may have to leave, and how.
"""

from __future__ import annotations

import math

from fastserve.scheduler.core.draft import Draft
from fastserve.scheduler.core.eviction import (
    MOST_DROPS,
    copies_s,
    evict,
    idle_jobs,
    upload_s,
    victims_for,
)
from fastserve.scheduler.core.group import Group
from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.types import KvOpKind, KvState, KvStrategy

# More of the device than this is never kept idle.
_LARGEST_RESERVE = 0.25
# So many that wait for a row, the next ones in line, are kept on the device: estimates say who is
# next better than when, as answers end unannounced.
_NEXT_IN_LINE = 2


def make_room(draft: Draft, job: Job, need: int, *, starving: bool) -> int:
    """Let worse jobs leave until `need` blocks are or will be free; returns how many that are.

    Nobody leaves if all of them together are not enough: it would only come back.
    Jobs that come earlier in the order but did not fit either leave for an older one that starves:
    else each could hold what the other needs.
    """
    coming = draft.spare(resident=job.booked > 0) + draft.leaving
    if draft.group.config.kv_strategy is KvStrategy.DEFER and not (job.booked or starving):
        return coming
    enough = coming
    for victim in victims_for(draft, job, starving=starving):
        enough += victim.booked
        if enough >= need:
            break
    else:
        return coming
    for victim in victims_for(draft, job, starving=starving):
        if coming >= need:
            break
        booked = victim.booked
        if evict(draft, victim, victims_for(draft, job, starving=starving), gainer=job):
            coming += booked
    return coming


def headroom(group: Group, job: Job, need: int) -> int:
    """Blocks that must be free beside the `need` of a job that comes back: those by which rows grow
    in the time that it takes to come and go. Otherwise somebody would soon be put aside again."""
    if group.config.kv_strategy is not KvStrategy.PROACTIVE or not job.peak:
        return 0
    iterations = copies_s(group, need, need) / group.cost.decode_s
    growth = group.running * iterations / group.info.block_size
    return min(int(growth), group.info.device_blocks - need)


def write_through(draft: Draft) -> None:
    """Copy full blocks of jobs that may have to leave, while nothing else leaves: the last to run
    first. They stay on the device; leaving is quicker then."""
    group = draft.group
    config, pace = group.config, group.pace
    pace.counts = (
        config.kv_write_through
        and config.kv_strategy is KvStrategy.PROACTIVE
        and group.info.host_blocks > 0
        and _full_soon(draft)
    )
    if not pace.counts or group.outward.pending:
        return
    link, budget_s, copies = group.outward, pace.budget_s(draft.now), 0
    # Fewer blocks add so little to the copy with which a job leaves that they are not worth one.
    least = max(1, math.ceil(link.fixed_s / link.block_s)) if link.block_s > 0 else 1
    missing = [
        job for job in group.resident if job.op is None and group.full_to_store(job) >= least
    ]
    while missing:
        job = max(missing, key=lambda job: (draft.next_at(job), draft.place(job)))
        missing.remove(job)
        blocks = min(link.most(budget_s), group.host_free, group.full_to_store(job))
        if blocks < 1:
            break
        # As long as nothing is known of copies, one shows it.
        budget_s -= link.alone(blocks) or budget_s
        draft.copy_out(job, blocks)
        copies += 1
    if copies:
        pace.begin(copies, draft.now)


def _full_soon(draft: Draft) -> bool:
    """Whether the device may be full before all that is on it could be copied out at this pace."""
    group = draft.group
    growth = group.running / group.cost.decode_s / group.info.block_size
    taken_per_s = group.newcomers.blocks_per_s(draft.now) + growth
    copy_s = group.device_used * group.outward.block_s / group.pace.share
    return group.free <= taken_per_s * copy_s or draft.spare() <= reserve_blocks(group, draft.now)


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
    reserve = reserve_blocks(draft.group, draft.now)
    missing = min(reserve, reserve - draft.spare() - draft.leaving)
    if missing <= 0:
        return
    idle = idle_jobs(draft)
    for victim in idle:
        booked = victim.booked
        if missing <= 0:
            break
        if evict(draft, victim, idle, gainer=None):
            missing -= booked


def fetch(draft: Draft, job: Job) -> None:
    """A job on the host has room, and its turn: upload it, or give its copy up if computing again
    is cheaper, in seconds of all jobs together (see `_recompute`)."""
    group = draft.group
    if group.config.kv_strategy is KvStrategy.PROACTIVE and job.drops < MOST_DROPS:
        compute_s = group.cost.more(0, job.host_tokens) * len(group.queue)
        if job.host_tokens > job.dropped_at and compute_s < upload_s(group, job):
            job.drops += 1
            job.dropped_at = job.host_tokens
            draft.operate(KvOpKind.DROP_HOST, job)
            return
    draft.operate(KvOpKind.UPLOAD, job)


def bring_back(draft: Draft) -> None:
    """Upload jobs that will run soon, the next one first: while plenty is free, and when it is time
    or they are the next in line also in place of jobs that will run much later."""
    group = draft.group
    if not group.host_used:
        return
    reserve = reserve_blocks(group, draft.now)
    waiting = sorted(
        (draft.next_at(job), draft.place(job), job)
        for job in draft.looked_at()
        if job not in draft.chosen
    )
    victims: list[Job] | None = None
    for turn, (next_at, _, job) in enumerate(waiting):
        if job.kv is not KvState.HOST or job.op is not None or job in draft.starved:
            continue
        need = group.need(job, group.config.lease)
        short = need - draft.spare()
        if short + 2 * reserve > 0:
            if turn >= _NEXT_IN_LINE and next_at > upload_s(group, job):
                return
            if victims is None:
                victims = idle_jobs(draft)
            if short + reserve > 0 and not _swap(draft, victims, short + reserve, next_at, job):
                return
            if need > draft.spare():
                continue
        draft.operate(KvOpKind.UPLOAD, job)


def _swap(draft: Draft, victims: list[Job], short: int, next_at: float, job: Job) -> bool:
    """Let jobs leave that will run so much later than `job` that they can be back by then."""
    short -= draft.leaving
    leave = []
    for victim in victims:
        if short <= 0:
            break
        back = draft.next_at(victim) - upload_s(draft.group, victim)
        if victim.op is None and back > next_at and draft.place(victim) > draft.place(job):
            leave.append(victim)
            short -= victim.booked
    if short > 0:
        return False
    for victim in leave:
        evict(draft, victim, leave, gainer=None)
    return True


def reserve_blocks(group: Group, now: float) -> int:
    """Idle blocks to keep: as configured, or else what newcomers and rows will take until blocks
    that begin to leave now are free."""
    if group.config.kv_reserve_blocks is not None:
        return min(group.config.kv_reserve_blocks, group.info.device_blocks)
    iteration_s = group.cost.decode_s
    # The copy begins within an iteration, and what it frees is used by one that begins after it.
    lead_s = 2 * iteration_s + group.outward.seconds(group.outward.usual)
    growth = group.running * lead_s / iteration_s / group.info.block_size
    wanted = math.ceil(group.newcomers.most(lead_s, now) + growth)
    return min(wanted, int(group.info.device_blocks * _LARGEST_RESERVE))
