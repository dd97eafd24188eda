"""From the order of the jobs to the next plan of a worker group."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from fastserve.scheduler.core import kv_planner
from fastserve.scheduler.core.draft import Draft
from fastserve.scheduler.core.group import Group
from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.types import (
    EventKind,
    JobState,
    KvOpKind,
    KvState,
    KvStrategy,
    Plan,
    PlanRow,
    PreemptMode,
    PreemptReason,
)

Tell = Callable[[Job, EventKind, float], None]
# Operations that leave the device copy as it is.
_BESIDE_ROWS = frozenset({KvOpKind.COPY_OUT, KvOpKind.EXPORT})


def make_plan(group: Group, now: float, tell: Tell, counters: Counter[str]) -> Plan | None:
    """The next plan, booked and noted as sent; None if the worker may go on as it does.

    Walks the jobs in the order of the policy and gives rows to those that fit, skipping those that
    do not. The walk ends when rows or tokens are used up, so it does not get longer with the queue.
    """
    late = group.catching_up() if group.came else {}
    group.clock(now)
    _promote(group, now, tell, counters)
    group.policy.weigh(now, *group.left)
    if group.queue.may_resort() and group.policy.resort(now):
        group.queue.resort()
    group.queue.settle()
    group.host_closed = now < group.host_reopens
    draft = Draft(group, now, group.config.lease, late=late)
    draft.release_ended()
    draft.move_kv()
    head = draft.head = _head(group)
    _choose_rows(draft, chain(head, _behind(group, head)), now)
    if not draft.rows and not group.ops and group.resident:
        _let_oldest_go_on(draft, now)
    group.held_up = kv_planner.held_up(draft)
    if group.config.kv_strategy is KvStrategy.PROACTIVE:
        kv_planner.keep_reserve(draft)
        kv_planner.bring_back(draft)
    _stop_others(draft, now, tell, counters)
    running = JobState.RUNNING
    for job, _ in draft.rows:
        job.sunk = False
        if job.state is not running:
            group.start(job)
            tell(job, EventKind.STARTED, now)
    group.left = (len(group.waiting), group.running)
    for job in [job for job in group.renew if job in draft.chosen]:
        group.introduce.setdefault(job.job_id, 0)
        del group.renew[job]
    quiet = not draft.ops and not group.restate and not group.introduce
    if quiet and _goes_on(group, draft.rows):
        if group.plans:
            group.plans[-1].held_up = group.held_up
        return None
    introduce, group.introduce = group.introduce, {}
    group.restate = False
    kv_planner.write_through(draft)
    plan_id = group.send(draft.lease, draft.rows, draft.chosen)
    return Plan(plan_id, draft.lease, draft.rows, draft.ops, group.dismissed, introduce)


def _head(group: Group) -> list[Job]:
    """As much of the order as a plan looks at."""
    return group.queue.first(group.max_rows + group.config.look_ahead + len(group.ops))


def _behind(group: Group, head: list[Job]) -> Iterator[Job]:
    """Whoever can run without moving, by key; only looked for if the head leaves rows."""
    if len(head) == len(group.queue):
        return
    seen = set(head)
    rest = group.queue.positions(job for job in group.resident if job not in seen)
    heapq.heapify(rest)  # few of them will be needed
    while rest:
        yield heapq.heappop(rest)[1]


def _promote(group: Group, now: float, tell: Tell, counters: Counter[str]) -> None:
    while group.waiting:
        job = next(iter(group.waiting))
        if not group.policy.promote(job, now):
            return
        del group.waiting[job]  # it starves no more
        group.queue.update(job)
        counters["promotions"] += 1
        tell(job, EventKind.PROMOTED, now)


def _choose_rows(draft: Draft, order: Iterable[Job], now: float) -> None:
    # Everything that a decode comes by on its way is a local: there is one per row and iteration.
    group, rows, chosen, late = draft.group, draft.rows, draft.chosen, draft.late
    lease, look_ahead, need_of = group.config.lease, group.config.look_ahead, group.need
    on_host, on_device, beside = KvState.HOST, KvState.DEVICE, _BESIDE_ROWS
    newest, ahead, block_size = group.plan_id, group.outstanding + lease, group.info.block_size
    rows_left, tokens_left = group.size()
    partial_prefills = passed = 0
    behind = len(group.queue)
    for job in order:
        behind -= 1
        if job.op is not None and not (job.op in beside and job.kv is on_device):
            continue
        if passed > look_ahead and not job.booked:
            continue
        known = job.prompt_len + len(job.output)
        if job.last_plan == newest and job.kv is on_device:  # what `need` says, written out
            reach = known + ahead
            need = -(-(reach if reach < job.max_len else job.max_len) // block_size)
        else:
            need = need_of(job, lease)
        if (need > job.booked or job.kv is on_host) and not _has_room(draft, job, need, now):
            iterations = _left_in_blocks(group, job)
            if iterations < 1:
                passed += 1
                continue
            draft.lease = min(draft.lease, iterations)
            draft.starved.discard(job)
            need = job.booked
        tokens = known - job.computed
        if tokens <= 1:  # 0: the worker is ahead of the tokens that it told
            tokens, row = 1, job.row or job.decode_row()
        else:
            # One token for everyone behind, and for those that just came what they lack: a prompt
            # must not stop the decodes of others.
            came = late.pop(job, None) is not None
            kept = min(rows_left - 1, behind) + sum(late.values())
            tokens = min(tokens, max(tokens_left - kept, 1))
            if tokens < job.remaining and not came:
                if partial_prefills == group.config.max_partial_prefills:
                    passed += 1
                    continue
                partial_prefills += 1
            row = PlanRow(job, tokens)
        rows_left -= 1
        tokens_left -= tokens
        if job.kv is not on_device:
            _settle(group, job, now)
        if need != job.booked:
            group.book_device(job, need)
        rows.append(row)
        chosen.add(job)
        if not rows_left or not tokens_left:
            return


def _left_in_blocks(group: Group, job: Job) -> int:
    """Iterations that a job can run in the blocks that it has, beside those of plans that were
    sent: while others leave for it, it need not stop."""
    if job.kv is not KvState.DEVICE:
        return 0
    return job.booked * group.info.block_size - job.known_len - group.pending(job)


def _let_oldest_go_on(draft: Draft, now: float) -> None:
    """Everyone on the device needs more memory, and nobody may take it from another one: the oldest
    takes it, or all of them would wait until somebody starves."""
    draft.unblocked = min(draft.group.resident, key=lambda job: job.seq)
    draft.starved.discard(draft.unblocked)
    _choose_rows(draft, [draft.unblocked], now)


def _has_room(draft: Draft, job: Job, need: int, now: float) -> bool:
    """Whether it can have a row now, with `need` blocks in all. If not, see that it can soon."""
    group = draft.group
    resident = job.booked > 0
    more = need - job.booked
    if not resident:
        more += kv_planner.headroom(group, job, need)
    if more > draft.spare(resident=resident):
        waited = now - job.wait_since
        starving = waited >= group.config.starvation_s or job is draft.unblocked
        coming = kv_planner.make_room(draft, job, more, starving=starving)
        if more > draft.spare(resident=resident):
            # Smaller ones may pass it if it has to wait for others to end, but not for ever.
            if coming >= more:
                draft.set_aside += more
                draft.promised.add(job)
            elif starving:
                draft.kept += more
            draft.starved.add(job)
            return False
    if job.kv is KvState.HOST:
        kv_planner.fetch(draft, job)
        return False
    return True


def _settle(group: Group, job: Job, now: float) -> None:
    """It begins on the device, with nothing computed."""
    if job.kv is KvState.NONE:
        group.newcomers.note(group.blocks(job.known_len), now)
    job.kv = KvState.DEVICE
    job.held_from = job.attained
    group.resident[job] = None


def _stop_others(draft: Draft, now: float, tell: Tell, counters: Counter[str]) -> None:
    """Jobs of the last plan that have no row any more are preempted."""
    group = draft.group
    chosen = draft.chosen
    if not group.plans or group.plans[-1].jobs <= chosen:
        return
    for job, _ in group.plans[-1].rows:
        if job in chosen or job.state is not JobState.RUNNING:
            continue
        if group.jobs.get(job.job_id) is not job:  # it has a row elsewhere
            continue
        mode = draft.evicted.get(job, PreemptMode.RESIDENT)
        if job in draft.starved or mode is not PreemptMode.RESIDENT:
            reason = PreemptReason.MEMORY
        else:
            reason = PreemptReason.QUANTUM if job.sunk else PreemptReason.PRIORITY
        counters[f"preemptions.{reason}.{mode}"] += 1
        group.stop(job, now)
        tell(job, EventKind.PREEMPTED, now)


def _goes_on(group: Group, rows: list[PlanRow]) -> bool:
    """Whether the last plan does the same, for some iterations more."""
    if not group.plans:
        return not rows
    last = group.plans[-1]
    if rows and last.lease_left <= group.config.lease // 2:
        return False
    if last.rows == rows:  # the usual case, and quickly seen
        return True
    position = 0
    for job, tokens in last.rows:
        if position < len(rows) and rows[position].job is job:
            if rows[position].tokens != min(tokens, job.remaining):
                return False
            position += 1
        elif job.live:
            return False
    return position == len(rows)
