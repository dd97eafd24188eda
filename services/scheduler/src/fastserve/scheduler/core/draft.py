"""A plan in the making: what it holds so far, and what memory is left."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fastserve.scheduler.core.enst import next_scheduled
from fastserve.scheduler.core.group import Group
from fastserve.scheduler.core.job import Job
from fastserve.scheduler.core.operations import Migration, Stage
from fastserve.scheduler.core.policies.base import Key
from fastserve.scheduler.core.types import KvOperation, KvOpKind, KvState, PlanRow, PreemptMode

_SENDABLE = frozenset({KvState.DEVICE, KvState.HOST})


@dataclass(slots=True)
class Draft:
    """Rows and operations of the next plan of a group.

    set_aside: free device blocks that wait, with others that are about to become free, for jobs
    that do not fit yet. Whoever comes later in the order must leave them alone.
    kept: likewise, but the others only become free when jobs end. Jobs that are on the device may
    use them to go on, or nothing would ever end; nobody else may.
    unblocked: takes memory as if it starved, since nobody could go on.
    """

    group: Group
    now: float
    lease: int  # iterations
    head: Sequence[Job] = ()  # the first of the order
    late: dict[Job, int] = field(default_factory=dict)  # `Group.catching_up`: those still to come
    rows: list[PlanRow] = field(default_factory=list)
    chosen: set[Job] = field(default_factory=set)  # those of `rows`
    ops: list[KvOperation] = field(default_factory=list)
    set_aside: int = 0
    kept: int = 0
    starved: set[Job] = field(default_factory=set)  # wanted a row, but there was no memory
    promised: set[Job] = field(default_factory=set)  # of them, those that room comes for
    unblocked: Job | None = None
    leavers: list[Job] | None = None  # who could leave, the last to run first; once somebody asked
    evicted: dict[Job, PreemptMode] = field(default_factory=dict)
    times: dict[Job, float] = field(default_factory=dict)  # see `next_at`
    ranks: dict[Job, int] = field(default_factory=dict)  # of `head`, once somebody asked

    def place(self, job: Job) -> Key:
        """Where a job stands: the smaller, the earlier. Who is not in the head comes after it."""
        if not self.group.queue.shared:
            return self.group.queue.position(job)
        if not self.ranks:
            self.ranks = {job: rank for rank, job in enumerate(self.head)}
        return (self.ranks.get(job, len(self.head)), *self.group.queue.position(job))

    def next_at(self, job: Job) -> float:
        """Seconds until it runs next, by estimate; infinite for those that were not looked at, who
        come later than all others and in the order of `place`."""
        self.looked_at()
        return self.times.get(job, math.inf)

    def looked_at(self) -> Iterable[Job]:
        """Jobs with an estimate of their own."""
        if not self.times:
            self.times = next_scheduled(self.group, self.head, self.now)
        return self.times

    def spare(self, *, resident: bool = False) -> int:
        """Device blocks for whoever comes next in the order.

        resident: for a job that is on the device already.
        """
        kept = 0 if resident else self.kept
        return max(0, self.group.free - self.set_aside - kept)

    @property
    def leaving(self) -> int:
        """Device blocks that become free when copies under way end."""
        return sum(
            op.job.booked
            for op in self.group.ops.values()
            if op.kind is KvOpKind.OFFLOAD and op.job is not None
        )

    def operate(self, kind: KvOpKind, job: Job) -> None:
        """Begin an operation on a job without one; book what it moves."""
        group = self.group
        self.ops.append(KvOperation(group.operation(kind, job, self.now), kind, job.job_id))
        match kind:
            case KvOpKind.OFFLOAD:
                group.book_host(job, host_need(group, job))
                group.set_kv(job, KvState.OFFLOADING)
                self.evicted[job] = PreemptMode.SWAP
            case KvOpKind.UPLOAD:
                group.set_kv(job, KvState.UPLOADING)
            case KvOpKind.DROP_DEVICE:
                # The worker frees the blocks before anything else of this plan.
                group.set_kv(job, KvState.HOST if job.host_tokens else KvState.DROPPED)
                kept = job.host_tokens > 0
                self.evicted[job] = PreemptMode.SWAP if kept else PreemptMode.RECOMPUTE

    def copy_out(self, job: Job, blocks: int) -> None:
        """Copy the next full blocks of a job that stays where it is."""
        group = self.group
        op_id = group.operation(KvOpKind.COPY_OUT, job, self.now, blocks)
        self.ops.append(KvOperation(op_id, KvOpKind.COPY_OUT, job.job_id, blocks))
        partial = bool(job.host_tokens % group.info.block_size)  # it is stored anew first
        group.book_host(job, group.blocks(job.host_tokens) + partial + blocks)

    def release_ended(self) -> None:
        """Free what jobs that are over still hold, before anything else."""
        group = self.group
        for job_id, leftover in list(group.to_release.items()):
            if group.releases(job_id):
                continue  # more of it came meanwhile
            op_id = group.release(job_id, leftover)
            self.ops.append(KvOperation(op_id, KvOpKind.RELEASE, job_id))
            del group.to_release[job_id]
        for job in group.to_drop:
            self.operate(KvOpKind.DROP_DEVICE, job)
        group.to_drop.clear()

    def move_kv(self) -> None:
        """Begin to send what goes to other groups, and to upload what came from them."""
        group = self.group
        for job, migration in group.leaving.items():
            if migration.stage is Stage.WANTED and job.op is None and job.kv in _SENDABLE:
                self._send(job, migration)
        for job_id, migration in group.coming.items():
            if migration.stage is Stage.SENT:
                op_id = group.take_in(migration, self.now)
                self.ops.append(KvOperation(op_id, KvOpKind.UPLOAD, job_id))

    def _send(self, job: Job, migration: Migration) -> None:
        group = self.group
        more = group.full_to_store(job) if job.kv is KvState.DEVICE else 0
        copies = max(0, min(more, group.host_free))
        held = group.blocks(job.host_tokens)
        op_id = group.operation(KvOpKind.EXPORT, job, self.now, held + copies)
        group.ops[op_id].migration = migration
        migration.stage = Stage.SENDING
        if copies:
            partial = bool(job.host_tokens % group.info.block_size)  # it is stored anew first
            group.book_host(job, held + partial + copies)
        to = migration.to.place
        self.ops.append(KvOperation(op_id, KvOpKind.EXPORT, job.job_id, copies, to))


def host_need(group: Group, job: Job) -> int:
    """Host blocks it may hold once it was offloaded; a part-filled block is stored anew first."""
    partial = bool(job.host_tokens % group.info.block_size)
    most = max(job.bound(group.pending(job)), job.host_tokens)
    return group.blocks(most) + partial
