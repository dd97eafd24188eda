"""Who leaves the device for others, and how.

With no room on the host either, a job that leaves loses what was computed. Jobs that take turns in
that would never end, so a job loses it only a few times for younger ones, and the oldest never
loses it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fastserve.scheduler.core.draft import Draft, host_need
from fastserve.scheduler.core.group import Group
from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.types import JobState, KvOpKind, KvStrategy

# So often a job may lose its KV cache for a younger one.
MOST_DROPS = 2
# Who came to the device stays until it was served for so many times what its copies take, so that
# jobs which take turns spend no more than this part of the time on copies.
_STAY = 30


def victims_for(draft: Draft, job: Job, *, starving: bool) -> Iterator[Job]:
    """Who may have to leave for a job. There can be thousands, and few are needed: one by one."""
    group = draft.group
    any_victim = group.policy.preemptive or job.state is JobState.RUNNING
    returns = group.config.kv_strategy is KvStrategy.PROACTIVE and not job.booked and job.peak > 0
    place = draft.place(job)
    for victim in leavers(draft):
        if not any_victim and victim.state is JobState.RUNNING:
            continue
        if returns and job.spec.priority >= victim.spec.priority and _stays(group, victim):
            continue
        if draft.place(victim) > place or (starving and victim.seq > job.seq):
            yield victim


def _stays(group: Group, victim: Job) -> bool:
    """Whether a job that comes back must wait, as this one came too short a time ago.

    The order may turn with every quantum. Newcomers and rows that grow may not be kept waiting for
    that, but a job that was put aside gains less than both copies cost. It never waits for longer
    than a job may starve.
    """
    served = victim.attained - victim.held_from
    if served >= group.config.starvation_s:
        return False
    return served < _STAY * copies_s(group, group.to_store(victim), victim.booked)


def copies_s(group: Group, out: int, back: int) -> float:
    """Seconds that a job cannot run for when so many blocks of it leave and come back."""
    # Beside the copies: it loses its row with the end of an iteration, and gets one with another.
    return group.outward.alone(out) + group.inward.alone(back) + 4 * group.cost.decode_s


def upload_s(group: Group, job: Job) -> float:
    """Seconds until it can run if its upload begins now."""
    copied = group.inward.seconds(group.blocks(job.host_tokens))
    # The plan for it comes while an iteration runs, and a row begins when another one is over.
    return copied + 2 * group.cost.decode_s


def leavers(draft: Draft) -> Iterator[Job]:
    """Jobs whose device blocks could be freed, the one that is estimated to run last first."""
    resident, chosen = draft.group.resident, draft.chosen
    if draft.leavers is None:
        draft.leavers = [job for job in resident if job.op is None and job not in chosen]
        draft.leavers.sort(key=lambda job: (draft.next_at(job), draft.place(job)), reverse=True)
    for job in draft.leavers:
        if job.op is None and job in resident and job not in chosen:
            yield job


def idle_jobs(draft: Draft) -> list[Job]:
    """Those of them that neither have a row nor were to get one."""
    return [
        job
        for job in leavers(draft)
        if job.state is not JobState.RUNNING and job not in draft.starved
    ]


def evict(draft: Draft, victim: Job, others: Iterable[Job], *, gainer: Job | None) -> bool:
    """Take the device blocks of a job away. False: not now, or not at the price of its KV.

    `others`: whose host copies may go for it. `gainer`: the job that waits for the blocks.
    """
    group = draft.group
    if victim.op is not None:
        return False
    if victim.host_tokens >= victim.computed and not group.pending(victim):
        draft.operate(KvOpKind.DROP_DEVICE, victim)  # the host copy is complete
        return True
    if group.config.kv_strategy is KvStrategy.PROACTIVE and _recompute(draft, victim, gainer):
        _drop(draft, victim)
        return True
    missing = host_need(group, victim) - victim.host_booked - group.host_free
    if group.config.kv_strategy is KvStrategy.RECOMPUTE:
        missing = max(missing, 1)  # as if the host were full
    if missing <= 0:
        draft.operate(KvOpKind.OFFLOAD, victim)
        return True
    if gainer is None or _drop_copies(draft, victim, others, missing):
        return False  # there will be room on the host soon
    if victim.drops < MOST_DROPS or gainer.seq < victim.seq:
        victim.drops += 1
        _drop(draft, victim)
        return True
    return False


def _drop(draft: Draft, victim: Job) -> None:
    victim.dropped_at = victim.computed
    draft.operate(KvOpKind.DROP_DEVICE, victim)


def _recompute(draft: Draft, victim: Job, gainer: Job | None) -> bool:
    """Whether it is cheaper to compute again what the host lacks than to copy it there and back.

    In seconds of all jobs together: computing delays whoever runs or waits for a row, a copy the
    one job that wants the blocks. Nobody loses anything twice without having got further.
    """
    group = draft.group
    if victim.computed <= victim.dropped_at:
        return False
    tokens = victim.bound(group.pending(victim)) - victim.host_tokens
    counts = tokens >= group.info.block_size  # the end of a block is no loss to speak of
    if counts and victim.drops >= MOST_DROPS:
        return False
    compute_s = group.cost.more(victim.host_tokens, tokens) * len(group.queue)
    blocks = group.to_store(victim)
    copy_s = group.outward.seconds(blocks) + group.inward.alone(blocks)
    if gainer is not None:
        copy_s += 2 * group.cost.decode_s  # see `upload_s`
    if compute_s >= copy_s:
        return False
    victim.drops += counts
    return True


def _drop_copies(draft: Draft, victim: Job, others: Iterable[Job], missing: int) -> bool:
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
